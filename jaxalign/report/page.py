"""report.html: a run on one page that needs no network, no script and no service. Every text on it is escaped."""

from __future__ import annotations

import collections
import math
import os
from pathlib import Path
from typing import Any

from jaxalign.report import frontier, judged, stage
from jaxalign.report.charts import Mark, plane
from jaxalign.report.markup import Html, join, tag
from jaxalign.report.read import STAGES, Stage, dig, document, number, policies as evaluated, read_rows, show
from jaxalign.report.read import stage as read_stage
from jaxalign.report.stage import fold, pretty, text
from jaxalign.report.style import CSS
from jaxalign.report.verdict import KL, headline, interval, verdicts
from jaxalign.types import UserError

TITLES = {"pretrain": "Pretraining", "sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO", "dpo": "DPO"}
COLOURS = {"pretrain": 0, "reward": 1, "sft": 2, "ppo": 3, "dpo": 4}
# Should anything ever slip through: the page may load nothing and run nothing.
HEAD = Html(
    '<!doctype html>\n<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)


def write(workdir: str | os.PathLike) -> Path:
    """Writes WORKDIR/report.html and returns its path. WORKDIR is a pipeline's, or that of a single stage.

    What is missing or damaged is said on the page. Raises UserError only if there is no such directory.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a directory: give the --workdir of a run")
    name = workdir.resolve().name
    body = single(workdir, name) if (workdir / "metrics.jsonl").exists() else pipeline(workdir, name)
    footer = tag("footer", "Written by jaxalign. This page is one file; it loads nothing.")
    page = join([HEAD, tag("title", f"{name} · jaxalign"), tag("style", Html(CSS)), tag("main", body, footer)])
    path, temp = workdir / "report.html", workdir / "report.html.tmp"
    temp.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temp, path)
    return path


def single(workdir: Path, name: str) -> Html:
    s = read_stage(workdir, "run")
    return join([tag("h1", name), tag("p", _machine(s.environment), class_="soft"), stage.section(s, "Training"), frontier.section({name: s.metrics}), reliability([s])])


def pipeline(workdir: Path, name: str) -> Html:
    problems: list[str] = []
    config, environment, evaluation = (document(workdir / f"{x}.json", problems) for x in ("config", "environment", "evaluation"))
    found = {p.parent.name: read_stage(p.parent, p.parent.name) for p in sorted(workdir.glob("*/metrics.jsonl"))}
    orders = (dig(s.config, "order") for s in found.values())
    planned = next((o for o in orders if isinstance(o, list) and all(isinstance(n, str) and n == Path(n).name and n not in ("", "..") for n in o)), STAGES)  # those that have not run are missed
    stages = [found.get(s) or read_stage(workdir / s, s) for s in dict.fromkeys([*planned, *found])]
    origins = lineage(workdir, problems)
    machine = environment or next((s.environment for s in reversed(stages) if s.environment), None)
    links = [("policies", "Policies"), ("samples", "Samples"), *((s.name, TITLES.get(s.name, s.name)) for s in stages), ("reliability", "Reliability"), ("setup", "Setup")]
    return join(
        [
            tag("h1", name),
            tag("p", _machine(machine), class_="soft"),
            *(tag("p", x, class_="missing") for x in problems),
            verdict(evaluation),
            tag("nav", *(tag("a", title, href=f"#{at}") for at, title in links)),
            policies(evaluation),
            frontier.section({s.name: s.metrics for s in stages}),
            samples(evaluation),
            *(stage.section(s, TITLES.get(s.name, s.name), evaluation) for s in stages),
            origins,
            reliability(stages),
            tag("h2", "Setup", id="setup"),
            seconds(evaluation),
            *(
                fold(title, tag("pre", pretty(x))) if x is not None else tag("p", f"No {title.lower()} was written.", class_="missing")
                for title, x in (("Config", config), ("Environment", machine), ("Evaluation", evaluation))
            ),
        ]
    )


def verdict(evaluation: Any) -> Html:
    rows = verdicts(evaluation)
    sentence, passed = headline(rows)
    kind, words = {True: "pass", False: "fail", None: "unknown"}, {True: "✓ met", False: "✗ missed", None: "? unknown"}
    lines = [
        tag(
            "tr", tag("td", words[r.passed] if r.target else "", class_="mark"), tag("td", r.what, tag("small", r.detail) if r.detail else None),
            tag("td", r.value, class_="n"), tag("td", r.target, class_="n") if r.target else None, class_=kind[r.passed],
        )
        for r in rows
    ]  # fmt: skip
    note = None if isinstance(evaluation, dict) else tag("p", "There is no evaluation: the run has not finished, or it stopped before.")
    head = ["", "", ("n", "measured"), *([("n", "target")] if any(r.target for r in rows) else [])]
    return tag("div", tag("strong", sentence), note, _table(head, lines) if lines else None, class_=f"verdict {kind[passed]}")


def policies(evaluation: Any) -> Html:
    """What the policies earn against how far they went, and the most that any policy could earn there."""
    title = tag("h2", "Policies", id="policies")
    known = evaluated(evaluation)
    if not known:
        return join([title, tag("p", "No policy has been evaluated.", class_="missing")])
    marks = [Mark(p.upper(), *xy, COLOURS.get(p, 5)) for p, d in known.items() if (xy := _point(d))]
    frontier = dig(evaluation, "frontier")
    curve = [xy for d in (frontier if isinstance(frontier, list) else []) if (xy := _point(d))]
    if curve and (start := _point(dig(known, "sft"))):
        curve.append(start)  # β = ∞: the policy that was tilted
    figure = (
        plane(marks, curve, title="Gold reward against KL", x="KL from SFT, nats per answer", unit="per answer", curve_name="optimal policy, SFT · exp(gold / β)")
        if marks or curve
        else tag("p", "No reward and KL to draw.", class_="missing")
    )
    rows = [
        tag(
            "tr", tag("td", tag("span", tag("b", p.upper()), class_=f"key s{COLOURS.get(p, 5)}")), tag("td", show(d.get("gold"), 3), class_="n"),
            tag("td", show(d.get("win_rate"), 3), tag("small", interval(d.get("win_interval")).removeprefix("95% interval ")), class_="n"),
            tag("td", show(d.get("kl"), 3), class_="n"), tag("td", show(d.get("length"), 3), class_="n"),
        )
        for p, d in known.items()
    ]  # fmt: skip
    table = _table(["", ("n", "gold reward"), ("n", "beats SFT"), ("n", "KL, nats"), ("n", "tokens")], rows)
    about = tag(
        "p",
        "Gold is the reward that the preference labels were drawn from. A tie is half a win. "
        "The dashed line, above which no policy can be, ends where its samples say too little (effective sample size below 100). "
        f"Intervals are 95%, over prompts. A win counts towards the target up to a KL of {show(KL, 3)} nats.",
        class_="soft",
    )  # fmt: skip
    chart = judged.best_of_n(evaluation)
    return join([title, tag("div", figure, tag("div", table, about), class_="pair"), judged.writing(known), tag("div", chart, class_="charts") if chart else None])


def samples(evaluation: Any, most: int = 24, open_: int = 4) -> Html:
    """Answers of all policies to the same prompt, side by side."""
    title = tag("h2", "Samples", id="samples")
    answers: dict[str, dict[str, list[dict]]] = {}
    for p, d in evaluated(evaluation).items():
        found = d.get("samples")
        for s in found if isinstance(found, list) else []:
            if isinstance(s, dict):
                answers.setdefault(str(s.get("prompt", "")), {}).setdefault(p, []).append(s)
    if not answers:
        return join([title, tag("p", "No samples were kept.", class_="missing")])
    blocks = []
    for prompt, by in list(answers.items())[:most]:
        row = tag("div", *(_answer(p, s) for p, found in by.items() for s in found), class_="answers")
        blocks.append(tag("div", text(prompt, "text prompt"), row, class_="sample"))
    more = blocks[open_:]
    return join([title, *blocks[:open_], fold(f"{len(more)} more of {len(answers)} prompts", *more) if more else None])


def reliability(stages: list[Stage]) -> Html:
    """What went wrong, and whether training went on."""
    counts = {s.name: stage.happened(s) for s in stages}
    columns = {"resume": "resumes", "interrupted": "interruptions", "skipped_step": "skipped steps", "damaged_checkpoint": "damaged checkpoints"}
    rows = [
        tag(
            "tr", tag("td", TITLES.get(s.name, s.name)), tag("td", show(s.metrics[-1].get("step"), 7) if s.metrics else "–", class_="n"),
            *(tag("td", n, class_="n") if (n := counts[s.name].get(k, 0)) == 0 else tag("td", tag("b", n), class_="n") for k in columns),
            tag("td", ", ".join(f"{k.replace('_', ' ')} {n}" for k, n in sorted(counts[s.name].items()) if k not in columns) or "–"),
        )
        for s in stages
    ]  # fmt: skip
    log = []
    for s in stages:
        for e in s.events:
            rest = ", ".join(f"{k}={v}" for k, v in e.items() if k not in ("time", "kind"))
            log.append(f"{e.get('time', '')}  {s.name}  {e.get('kind', '')}  {rest}")
    table = _table(["", ("n", "steps"), *(("n", x) for x in columns.values()), "other events"], rows)
    return join([tag("h2", "Reliability", id="reliability"), table, fold(f"{len(log)} events", tag("pre", "\n".join(log))) if log else tag("p", "No events.", class_="soft")])


def lineage(workdir: Path, problems: list[str]) -> Html | None:
    """Which weights and files every stage came from."""
    found = read_rows(workdir / "lineage.jsonl", problems)
    if not found:
        return None
    short = lambda x: tag("code", str(x)[:8]) if x else None
    rows = []
    for e in found:
        parents, data = (e.get(k) if isinstance(e.get(k), dict) else {} for k in ("parents", "data"))
        origin = lambda k, v: (tag("small", f"{k} "), str(dig(v, "from") or "–"), " ", short(dig(v, "weights") or dig(v, "files")), Html("<br>"))
        files = [(str(p), " ", short(h), Html("<br>")) for p, h in data.items()]
        who = e.get("objective") or (f"labels by {e['labeller']}" if e.get("labeller") else "")
        accuracy = number(dig(e, "held_out", "accuracy"))
        rows.append(tag("tr", tag("td", tag("b", str(e.get("name", ""))), tag("small", f" {who}", f", held-out accuracy {show(accuracy, 3)}" if accuracy is not None else "")), tag("td", short(e.get("weights"))), tag("td", *(x for k, v in parents.items() for x in origin(k, v))), tag("td", *(x for f in files for x in f))))
    return join([tag("h2", "Lineage", id="lineage"), _table(["", "weights", "made from", "data"], rows)])


def seconds(evaluation: Any) -> Html | None:
    """Where the time went: a bar, and its parts in words."""
    spent = dig(evaluation, "seconds")
    parts = {str(k): v for k, x in (spent.items() if isinstance(spent, dict) else ()) if k != "total" and (v := number(x)) is not None and math.isfinite(v) and v >= 0}
    if not sum(parts.values()):
        return tag("p", "No timings were written.", class_="missing")
    bar = [tag("span", class_=f"s{COLOURS.get(k, 5)}", style=f"flex-grow:{v / sum(parts.values()):.5f}", title=f"{k} {show(v, 3)} s") for k, v in parts.items()]
    keys = [tag("span", k, " ", tag("b", f"{show(v, 3)} s"), class_=f"key s{COLOURS.get(k, 5)}") for k, v in parts.items()]
    return join([tag("h3", "Where the time went"), tag("div", *bar, class_="bar"), tag("div", *keys, class_="keys")])


def _answer(policy: str, s: dict) -> Html:
    return tag("div", tag("header", tag("b", policy.upper()), tag("span", "gold ", show(s.get("gold"), places=2))), text(s.get("completion", "")), class_=f"answer s{COLOURS.get(policy, 5)}")


def _point(d: Any) -> tuple[float, float] | None:
    x, y = number(dig(d, "kl")), number(dig(d, "gold"))
    return (x, y) if x is not None and y is not None and abs(x) < 1e9 and abs(y) < 1e9 else None


def _table(head: list, rows: list[Html]) -> Html:
    cells = [tag("th", h[1], class_=h[0]) if isinstance(h, tuple) else tag("th", h) for h in head]
    return tag("div", tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *rows)), class_="scroll")


def _machine(environment: Any) -> str:
    known = collections.OrderedDict((k, dig(environment, k)) for k in ("devices", "device", "system", "python", "jax", "flax", "git_commit"))
    if not any(known.values()):
        return "No environment was written."
    known["git_commit"] = str(known["git_commit"] or "")[:10] + (" with local changes" if dig(environment, "git_dirty") else "")
    words = {"devices": "{} ×", "device": "{}", "system": "· {}", "python": "· Python {}", "jax": "· JAX {}", "flax": "· Flax {}", "git_commit": "· commit {}"}
    return " ".join(words[k].format(v) for k, v in known.items() if v).removeprefix("· ")
