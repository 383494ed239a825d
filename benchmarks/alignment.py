"""How well PPO and DPO align, beside the best that any policy could do at their KL. Three seeds, about twenty minutes:

    python benchmarks/alignment.py --workdir=runs/alignment --write=docs/results.md

Each seed is a run of configs/quickstart.py in a world of its own. Printed per seed: pretraining loss over the grammar's
entropy, reward-model accuracy beside the gold reward's, and for both policies the gold reward, the sequence KL to SFT
(nats, k1 over fresh samples) and the win rate against SFT's samples of the same held-out prompts, with its interval by
resampling prompts. The optimum pi* ~ pi_sft exp(gold / beta) is estimated from 20,480 SFT samples (20 prompts, 1,024
each), self-normalised, and given only where the effective sample size of every prompt's weights averages 100 or more.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from speed import write

from jaxalign.cli import pipeline

ROOT = Path(__file__).resolve().parent.parent


def config(name: str, arg: str | None, seed: int):
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(arg)
    c.seed = seed
    return c


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workdir", default="runs/alignment")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--preset", default="", help="the config's argument (smoke, for trying this script)")
    p.add_argument("--samples", type=int, default=2000, help="evaluation samples per policy")
    p.add_argument("--prompts", type=int, default=20)
    p.add_argument("--each", type=int, default=1024)
    p.add_argument("--write", type=Path, help="put the table into this page, between its markers")
    a = p.parse_args()
    table = []
    for seed in range(a.first, a.first + a.seeds):
        c = config("quickstart.py", a.preset or None, seed)
        c.world.samples = a.samples
        c.world.frontier.update(prompts=a.prompts, each=a.each)
        workdir = Path(a.workdir).absolute() / f"seed-{seed}"
        e = pipeline.run(c, workdir)
        table.append((seed, e))
    out = ["| seed | loss / floor | reward acc. (gold) | policy | gold reward | KL | win rate [95 %] | optimum's gold at that KL |", "|---|---|---|---|---|---|---|---|"]
    for seed, e in table:
        f = sorted((x["kl"], x["gold"]) for x in e["frontier"]) or [(0.0, e["policies"]["sft"]["gold"])]
        for name in ("sft", "ppo", "dpo"):
            v = e["policies"][name]
            best = f"{np.interp(v['kl'], *zip((0.0, e['policies']['sft']['gold']), *f)):.2f}" if v["kl"] <= f[-1][0] else f"(known to {f[-1][0]:.1f} nats: {f[-1][1]:.2f})"
            win = f"{v['win_rate']:.3f} [{v['win_interval'][0]:.3f}, {v['win_interval'][1]:.3f}]" if "win_rate" in v else "–"
            head = f"{seed} | {e['pretrain']['ratio']:.4f} | {e['reward']['accuracy']:.3f} ({e['reward']['gold_accuracy']:.3f})" if name == "sft" else " | | "
            out.append(f"| {head} | {name} | {v['gold']:.2f} | {v['kl']:.2f} | {win} | {best} |")
    print("\n" + "\n".join(out))
    if a.write:
        write(a.write, "\n".join(out), "alignment.py")


if __name__ == "__main__":
    main()
