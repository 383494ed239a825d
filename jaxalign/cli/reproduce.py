"""A published result, run again from its config: curves, a figure, and whether they still are what was committed.

    jaxalign reproduce                      which there are
    jaxalign reproduce randomwalks          all seeds, then the comparison; kill it anywhere, run it again, it goes on
    jaxalign reproduce randomwalks --seeds=1
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from absl import flags

from jaxalign.cli.main import common
from jaxalign.types import UserError


def define(fv):
    common(fv, config=False)
    flags.DEFINE_integer("seeds", 0, "how many seeds, from 0 on (0: as many as the reproduction asks for)", lower_bound=0, flag_values=fv)
    flags.DEFINE_integer("first_seed", 0, "the first of them", lower_bound=0, flag_values=fv)
    flags.DEFINE_bool("only_compare", False, "train nothing: compare the seeds that are there", flag_values=fv)
    flags.DEFINE_bool("show", False, "print how to run one seed or one arm by hand", flag_values=fv)
    flags.DEFINE_bool("write", False, "update the committed curve, the figure and the page", flag_values=fv)
    flags.DEFINE_string("docs", "docs", "where reproductions.md and reproductions/NAME.json are", flag_values=fv)


def main(fv, rest):
    # Arms and seeds compile the same programs; also the quick ones are worth keeping, for there are many runs.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    from jaxalign.reproduce import page, runner

    if not rest:
        for name in runner.names():
            r = runner.load(name)
            print(f"{name:18} {r.title}: {len(r.figures)} figures, {r.seeds} seeds")
        return
    if len(rest) > 1:
        raise UserError(f"one reproduction at a time, got {', '.join(rest)}")
    name = rest[0]
    r = runner.load(name)
    if fv.show:
        print(sys.modules[r.get_config.__module__].__doc__.strip())
        return
    workdir = Path(fv.workdir or f"runs/reproduce/{name}")
    seeds = range(fv.first_seed, fv.first_seed + (fv.seeds or r.seeds))
    if fv.only_compare:
        seeds = [s for s in seeds if runner.complete(r, workdir, s)]
        if not seeds:
            raise UserError(f"{workdir} holds no finished seed of {name}; leave --only_compare out, or name its --workdir")
    else:
        runner.run(r, workdir, seeds)
    got = {**runner.measure(r, workdir, list(seeds)), "machine": page.machine()}
    print(page.results(r, got), page.cost(got), sep="\n\n")
    (workdir / "measured.json").write_text(json.dumps(got))
    (workdir / f"{name}.svg").write_text(page.figure(r, got))
    kept = Path(fv.docs) / "reproductions" / f"{name}.json"
    if fv.write:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(got, separators=(",", ":")) + "\n")
        kept.with_suffix(".svg").write_text(page.figure(r, got))
        page.write(Path(fv.docs) / "reproductions.md", name, page.section(r, name, got))
        page.write(Path(fv.docs) / "reproductions.md", "overview", page.overview(runner.committed(kept.parent)))
        print(f"wrote {kept}, its figure and its section")
        return
    if not kept.exists():
        raise UserError(f"there is no {kept} to compare with; run it from the root of the repository, or write it with --write")
    rows = runner.compare(r, got, json.loads(kept.read_text()))
    print("\n" + page.comparison(rows))
    if off := [x.name for x in rows if not x.within]:
        print(f"\noff by more than the tolerance: {', '.join(off)}")
        sys.exit(1)
    print("\nwithin the tolerance of the committed run")
