"""The road of configs/real.py on public data sets: prepares them, runs the pipeline, tabulates. Under an hour on two cores:

    python benchmarks/real.py --data=DIR --workdir=runs/real --write=docs/results.md

DIR holds, as their publishers name them (docs/results.md has the sources and the licences),

    pretrain/books/*.txt.gz, pretrain/wikitext2/valid.txt.gz    the last 5 % of each file are held out
    sft/instruction_data.json                                   one instruction in ten is held out
    preference/hh_harmless_base_test.jsonl.gz                   one prompt in eight is held out, with all its pairs

What is held out goes by the CRC-32 of the instruction or prompt. Only aggregates are written to the page, no text.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import math
import os
import re
import zlib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from alignment import config
from speed import write

from jaxalign import build, report
from jaxalign.cli import pipeline
from jaxalign.data import formats
from jaxalign.objectives import lm
from jaxalign.report import charts, style
from jaxalign.tasks.reviews import write_jsonl
from jaxalign.train import state
from jaxalign.types import UserError

CURVES = [  # file, title, unit, [(stage, metric, name)]
    ("pretrain", "Pretraining, negative log-likelihood", "nats per token", [("pretrain", "nll", "training"), ("pretrain", "eval/nll", "held out")]),
    ("sft", "SFT, negative log-likelihood", "nats per token", [("sft", "nll", "training"), ("sft", "eval/nll", "held out")]),
    ("reward", "Reward model, accuracy", "of pairs", [("reward", "accuracy", "training"), ("reward", "eval/accuracy", "held out")]),
    ("dpo", "DPO, accuracy of the implicit reward", "of pairs", [("dpo", "rewards/accuracies", "training"), ("dpo", "eval/rewards/accuracies", "held out")]),
    ("margin", "DPO, margin of the implicit reward", "", [("dpo", "rewards/margins", "training"), ("dpo", "eval/rewards/margins", "held out")]),
    ("ppo", "PPO, reward", "per answer", [("ppo", "objective/scores", "reward")]),
    ("kl", "PPO, KL from SFT", "nats per answer", [("ppo", "objective/kl", "KL")]),
]


def held(text: str, share: int) -> bool:
    return zlib.crc32(text.encode()) % share == 0


def prepare(data: Path, out: Path) -> dict[str, int]:
    """Writes the files that configs/real.py names; returns their numbers of rows."""
    files: dict[str, list] = {k: [] for k in ("pretrain", "pretrain_eval", "sft", "sft_eval", "pairs", "pairs_eval", "prompts")}
    for path in [*sorted((data / "pretrain/books").glob("*.txt.gz")), data / "pretrain/wikitext2/valid.txt.gz"]:
        text = gzip.open(path, "rt", encoding="utf-8").read()
        cut = text.rfind("\n", 0, int(0.95 * len(text))) + 1
        files["pretrain"].append({"text": text[:cut]})
        files["pretrain_eval"].append({"text": text[cut:]})
    for r in json.loads((data / "sft/instruction_data.json").read_text()):
        prompt = r["instruction"] + (f"\n{r['input']}" if r["input"] else "")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": r["output"]}]
        files["sft_eval" if held(r["instruction"], 10) else "sft"].append({"messages": messages})
    seen = set()
    for record, where in formats.read(str(data / "preference/hh_harmless_base_test.jsonl.gz"), on_bad_row="skip"):
        try:
            example = formats.canonical(record, where)
        except UserError:  # a dialogue with an empty turn, or two of one speaker: ten of them
            continue
        prompt = [{"role": m.role, "content": m.content} for m in example.prompt]
        key = json.dumps(prompt)
        files["pairs_eval" if held(key, 8) else "pairs"].append(record)
        if not held(key, 8) and key not in seen:
            files["prompts"].append({"prompt": prompt})
            seen.add(key)
    for name, records in files.items():
        write_jsonl(out / f"{name}.jsonl", records)
    return {k: len(v) for k, v in files.items()}


def perplexities(w, c, policies: list[str]) -> dict[str, dict[str, float]]:
    """{policy: {stage: perplexity on that stage's held-out file}}."""
    out = {}
    for data in ("pretrain", "sft"):
        d = c.stages[data].data
        measure = build.evaluation(lm.lm(w.model), w.mesh, {}, build.data_source(w, d, d.eval_path, d.batch_size, 0, shuffle=False))
        for name in policies:
            params = build.load_params(w, str(w.stage_dir(name).absolute()), w.model.specs(), name)
            with jax.set_mesh(w.mesh):
                nll = measure(state.TrainState(0, params, (), (), jax.random.key(0)))["nll"]
            out.setdefault(name, {})[data] = math.exp(nll)
    return out


def lines(workdir: Path, stage: str) -> list[dict]:
    return [json.loads(x) for x in (workdir / stage / "metrics.jsonl").read_text().splitlines()]


def curve(workdir: Path, stage: str, metric: str) -> tuple[list, list]:
    return tuple(zip(*((r["step"], r[metric]) for r in lines(workdir, stage) if metric in r)))


def draw(workdir: Path, title: str, unit: str, parts: list) -> str:
    """An SVG of its own, from the report's charts and style sheet."""
    series = [charts.Series(name, *curve(workdir, stage, metric), colour=i) for i, (stage, metric, name) in enumerate(parts)]
    figure = str(charts.lines(series, title=title, unit=unit))
    svg = re.search(r"<svg.*</svg>", figure, re.S)[0].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    svg = svg.replace(">", f"><style>{style.CSS} svg {{ background: var(--card) }}</style>", 1)
    names = [f'<text x="368" y="{24 + 15 * i}" text-anchor="end" class="label" style="fill: var(--c{i})">{s.name}</text>' for i, s in enumerate(series)]
    return svg.replace("</svg>", "".join(names) + "</svg>")


def table(head: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, r))} |" for r in (head, ["---"] * len(head), *rows))


def page(workdir: Path, counts: dict, e: dict, ppl: dict, w, images: str) -> str:
    m = {s: lines(workdir, s) for s in ("pretrain", "sft", "reward", "dpo", "ppo")}
    last = lambda stage, key: next(r[key] for r in reversed(m[stage]) if key in r)
    n = sum(math.prod(s.shape) for s in jax.tree.leaves(w.model.specs(), is_leaf=lambda x: hasattr(x, "axes")))
    reward = e["reward"]
    collected = [r for r in m["ppo"] if "objective/kl" in r]
    picks = [collected[i] for i in sorted({round(x) for x in np.linspace(0, len(collected) - 1, 9)})]
    mean = lambda rows, k: float(np.mean([r[k] for r in rows]))
    scores = np.array([r["objective/scores"] for r in collected])
    gain = scores[-8:].mean() - scores[:8].mean()
    error = 1.96 * math.sqrt((scores[-8:].var(ddof=1) + scores[:8].var(ddof=1)) / 8) if len(scores) >= 16 else math.nan
    return "\n\n".join(
        [
            f"{datetime.date.today()}, {os.cpu_count()} CPU cores, jax {jax.__version__}, seed {w.config.seed}: a llama-shaped decoder of {n / 1e6:.1f} M parameters "
            f"(dim {w.model.config.dim}, {w.model.config.layers} layers), vocabulary of {w.model.config.vocab} trained on the text. "
            + ", ".join(f"{k} {v:.0f} s" for k, v in e["seconds"].items()) + ".",
            "Rows: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()) + ". Pairs of more than 384 tokens are dropped, and those whose prompt has more than 256; so are PPO's prompts of more than 128.",
            "## Held-out perplexity, per token",
            table(["model", "text (books, WikiText)", "demonstrations"], [[k, f"{v['pretrain']:.1f}", f"{v['sft']:.2f}"] for k, v in ppl.items()]),
            "## Preferences, held-out pairs",
            table(
                ["model", "accuracy", "95 % interval", "margin", "pairs"],
                [
                    ["reward model", f"{reward['accuracy']:.3f}", "[{:.3f}, {:.3f}]".format(*reward["interval"]), f"{last('reward', 'eval/margin'):.3f}", f"{reward['pairs']:,}"],
                    ["DPO, implicit reward", f"{last('dpo', 'eval/rewards/accuracies'):.3f}", "", f"{last('dpo', 'eval/rewards/margins'):.3f}", f"{reward['pairs']:,}"],
                ],
            ),
            f"On the pairs trained on, over the last 20 steps: reward model {mean(m['reward'][-20:], 'accuracy'):.3f}, DPO {mean(m['dpo'][-20:], 'rewards/accuracies'):.3f}. "
            f"DPO moved log p(chosen) to {last('dpo', 'eval/logps/chosen'):.1f} and log p(rejected) to {last('dpo', 'eval/logps/rejected'):.1f} nats per answer, held out.",
            "## PPO, reward against KL",
            table(
                ["step", "reward", "KL to SFT, nats", "entropy per answer", "tokens", "unfinished"],
                [[r["step"], f"{r['objective/scores']:.3f}", f"{r['objective/kl']:.2f}", f"{r['objective/entropy']:.0f}", f"{r['completions/mean_length']:.1f}", f"{r['completions/truncated_frac']:.0%}"] for r in picks],
            ),
            f"Mean reward of the last eight batches of prompts over that of the first eight: {gain:+.3f} ± {error:.3f} (95 %, over batches) "
            "(reward-model units: 0 and 1 are mean and standard deviation over the training pairs' answers).",
            "## Curves",
            *(f"{title}{', ' + unit if unit else ''}:\n\n![{title}]({images}/{file}.svg)" for file, title, unit, _ in CURVES),
        ]
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--workdir", type=Path, default=Path("runs/real"))
    p.add_argument("--preset", default="", help="smoke, for trying this script")
    p.add_argument("--write", type=Path, help="put the tables into this page, between its markers, and the curves beside it")
    a = p.parse_args()
    c, workdir = config("real.py", a.preset or None, 0), a.workdir.absolute()
    counts = prepare(a.data, workdir / "data")
    e = pipeline.run(c, workdir)
    w = build.world(c, workdir)
    ppl = perplexities(w, c, ["pretrain", "sft", "dpo", "ppo"])
    report.write(workdir)
    images = (a.write.with_suffix("") if a.write else workdir / "curves")
    text = page(workdir, counts, e, ppl, w, images.name)
    print(text)
    images.mkdir(parents=True, exist_ok=True)
    for file, title, unit, parts in CURVES:
        (images / f"{file}.svg").write_text(draw(workdir, title, unit, parts))
    if a.write:
        write(a.write, text, "real.py")


if __name__ == "__main__":
    main()
