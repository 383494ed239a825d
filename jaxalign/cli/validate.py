"""Everything but the training. Refuses what would train on nothing, or teach a model never to stop; else says what there is."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from absl import flags

from jaxalign.cli.main import common, needed
from jaxalign.types import UserError


def define(fv):
    common(fv)
    flags.DEFINE_string("stage", None, "which stage (default: all)", flag_values=fv)


def main(fv, rest):
    needed(fv, "config", "workdir")
    from jaxalign import build
    from jaxalign.cli import pipeline

    config = fv.config
    build.check(config)
    stages = build.stages(config)
    if fv.stage and fv.stage not in stages:
        raise UserError(f"no stage {fv.stage!r};{build.nearest(fv.stage, list(stages))}")
    if "world" in config and not (Path(fv.workdir) / "data").exists():  # what the pipeline would write first, put aside
        with tempfile.TemporaryDirectory() as aside:
            pipeline._write_data(build.imported(config.world.name)(seed=config.seed), config, Path(aside))
            _validate(config, stages, fv.stage, aside)
    else:
        _validate(config, stages, fv.stage, fv.workdir)


def _validate(config, stages, only, workdir) -> None:
    from jaxalign import build
    from jaxalign.data import sources, templates, tokenizers

    w = build.world(config, workdir)
    print(f"model: {w.model.config}")
    print(f"tokenizer: {w.tokenizer.vocab_size} ids, {w.tokenizer.names or 'special tokens without names'}, {w.tokenizer.fingerprint[:12]}")
    for n, d in enumerate(tokenizers.differences(w.find(config.tokenizer.path or config.model.path or "tokenizer"))):
        print(f"  {'warning: tokenizer.model and tokenizer.json differ; the first is used unless it lacks tokens' if n == 0 else ''}\n    {d.text!r}: {d.first} and {d.second}")
    _template(w)
    stops = templates.stop_ids(w.tokenizer, w.template)
    print(f"  an answer ends with {tokenizers.decode_with_specials(w.tokenizer, stops[:1])!r}, id {stops[0]}; a sampler stops at {list(stops)}")
    for name, c in stages.items():
        if only not in (None, name):
            continue
        for label, path in ((name, c.data.path), (f"{name} (held out)", c.data.get("eval_path"))):
            if path is None or label != name and not path:
                continue
            if {"world", "rounds"} & set(config) and not Path(w.find(path)).exists():
                print(f"{label}: {path} is not written yet: an earlier part of the pipeline makes it")
                continue
            source = build.data_source(w, c.data, path, c.data.batch_size, config.seed)
            report = source.report()
            _stops_trained(sources, source, stops, c.data, label, report)
            share = f"{report['targets'] / max(1, report['tokens']):.1%} of {report['tokens']} tokens trained" if c.data.kind != "prompts" else f"{report['tokens']} tokens"
            print(f"{label}: {c.objective.name}, {c.data.kind} from {path}: {share}\n  {json.dumps(report)}")
    print("valid")


def _template(w) -> None:
    from jaxalign.data import jinja

    print(f"template: {w.template.name}")
    if not isinstance(w.template, jinja.Jinja):
        return
    try:
        jinja.check(w.template)
    except UserError as e:
        raise UserError(f"template {w.template.name!r}: {e}") from None
    for note in jinja.notes(w.template):
        print(f"  note: {note}")


def _stops_trained(sources, source, stops: tuple[int, ...], data, label: str, report: dict) -> None:
    """Refuses a set in which no row teaches the model to stop; counts the rows that do."""
    if data.kind == "prompts" or data.get("packing") == "chop":
        return
    import numpy as np

    from jaxalign.report import tokens

    trained = 0
    for batch in sources.eval_batches(source):
        trained += sum(int((np.isin(t, stops) & (m > 0)).sum()) for t, m, _ in tokens.rows(batch))
    report["trained_stops"] = trained
    if not trained:
        raise UserError(
            f"{label}: the stop token (id {stops[0]}) is trained in no row, so the model would never stop; raise the length limits (rows may be cut "
            "before it), or mend the template"
        )
