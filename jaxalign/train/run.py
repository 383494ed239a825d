"""The one loop: draw a batch, step, write the numbers, save. It cannot tell pretraining from PPO.

Everything that decides the next step is in the checkpoint: the state, the source's position (with the experience in
flight), the count of skipped steps and the byte offsets of the log files. So a killed run goes on as if nothing had been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from typing import Any, Callable

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import shard, tree
from jaxalign.train import state as states
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.log import RunLog
from jaxalign.train.progress import Phases, Progress, Trace, peak_memory, summary
from jaxalign.train.state import TrainState
from jaxalign.types import Source, UserError


@dataclasses.dataclass(frozen=True)
class Loop:
    steps: int
    save_every: int = 0  # 0: at the end only
    eval_every: int = 0  # 0: at the end only, if there is an evaluation
    log_every: int = 1
    max_skipped: int = 10  # consecutive non-finite steps before giving up
    keep: int = 2  # checkpoints

    def __post_init__(self):
        if self.steps < 1 or self.log_every < 1 or min(self.save_every, self.eval_every) < 0 or self.keep < 1:
            raise UserError(f"train needs steps, log_every and keep >= 1, save_every and eval_every >= 0; got {self}")


class Interrupted(SystemExit):
    """SIGTERM or SIGINT: the run saved and stopped. Exit code 143."""

    def __init__(self):
        super().__init__(143)


@contextlib.contextmanager
def _stop_signal():
    """Yields a function that says whether SIGTERM or SIGINT has come. A second signal acts at once."""
    seen: list[int] = []

    def handler(number, frame):
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)

    try:
        old = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (notebooks, tests): signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: _agree(bool(seen))
    finally:
        for s, h in old.items():
            signal.signal(s, h)


def _agree(flag: bool) -> bool:
    """The same answer on every process: a lone one that stops would leave the others waiting in a collective."""
    return bool(shard.agreed(int(flag)))


def resume(state: TrainState, source: Source, checkpoints: Checkpoints, log: RunLog, mesh, settings: dict) -> tuple[TrainState, dict]:
    """(state, loop meta) from the newest checkpoint that verifies; the fresh state and {} where there is none.

    A damaged newest checkpoint falls back to the previous good one, with an event. Raises DamagedCheckpoint when
    checkpoints exist and none verifies: never a silent restart. Raises UserError, naming them, when settings or data
    are not those of the checkpoint. Nothing on disk has changed when it raises.
    """
    step, damaged = checkpoints.latest_good()
    if step is None:
        log.truncate({})
        return state, {}
    meta = checkpoints.meta(step)
    if changed := changes(meta["settings"], json.loads(json.dumps(settings))):
        raise UserError(f"{log.workdir}: the config is not that of checkpoint {step}: {'; '.join(changed)}. Restore the old config, or use a fresh --workdir")
    rows = NamedSharding(mesh, P(shard.ACTIVATIONS["batch"]))

    def place(x):
        fits = len(x.shape) > 0 and x.shape[0] % shard.batch_shards(mesh) == 0
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if fits else shard.replicated(mesh))

    saved = checkpoints.structure(step)
    target = {"state": states.abstract(state), "source": jax.tree.map(place, saved.get("source") or {})}
    arrays, meta = checkpoints.restore(step, target)
    source.load_state_dict({**meta["source"], "arrays": arrays["source"] or None})
    log.truncate(meta["offsets"])
    for bad, why in damaged.items():
        log.event("damaged_checkpoint", step=bad, reason=str(why))
    for name, why in checkpoints.ignored().items():
        log.event("ignored_file", name=name, reason=why)
    checkpoints.rewind(step)
    log.event("resume", step=step)
    return arrays["state"], meta


def changes(then: Any, now: Any, at: str = "") -> list[str]:
    """Every setting that is not what it was, by its dotted name."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [c for k in {**then, **now} for c in changes(then.get(k), now.get(k), f"{at}.{k}" if at else k)]
    return [] if then == now else [f"{at} was {then!r}, is now {now!r}"]


def train(
    state: TrainState,
    step: Callable,
    source: Source,
    frozen: dict,
    loop: Loop,
    *,
    mesh,
    log: RunLog,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
    name: str = "train",
    settings: dict | None = None,
    config: dict | None = None,
    trace: Trace = Trace(),
) -> TrainState:
    """Run to `loop.steps`, from the newest checkpoint if there is one. Returns the last state.

    `settings` (JSON values): all that shapes training; a checkpoint made with others is refused. `config` goes to
    config.json once it is known that the run can go on.

    Raises UserError after `max_skipped` non-finite steps in a row, Interrupted on SIGTERM or SIGINT after saving.
    """
    meta: dict[str, Any] = {}
    if checkpoints is not None:
        state, meta = resume(state, source, checkpoints, log, mesh, settings or {})
    if config is not None:
        log.snapshot(config)
    begin = done = int(state.step)
    if begin >= loop.steps:
        log.event("already_complete", step=begin)
        return state
    skipped, before = meta.get("skipped", {"in_a_row": 0, "total": 0}), meta.get("productive", 0.0)
    progress = Progress(name, loop.steps, start=begin, flops_per_token=flops_per_token, peak_flops=peak_flops, process_index=jax.process_index())
    count_tokens = jax.jit(lambda segments: sum((s != 0).sum() for s in segments))
    phases, began = Phases(), log.began()
    if hasattr(source, "phase"):  # of online sources: the loop sees one draw where they sample, score and compute advantages
        source.phase = phases
    log.timings(begin, {"time": time.time()})

    def save():
        with phases("save"), progress.paused():
            d = source.state_dict()
            arrays = {"state": state, "source": d.pop("arrays", {})}
            rest = {"skipped": skipped, "productive": before + phases.productive(), "offsets": log.offsets(), "settings": settings or {}}
            checkpoints.save(done, arrays, {"source": d, **rest})

    def timings():
        now = time.time()
        counted = {"goodput": (before + phases.productive()) / max(now - began, 1e-9), "compilations": phases.compilations, "peak_memory_bytes": peak_memory()}
        return {"time": now, **{f"seconds/{k}": v for k, v in phases.seconds.items()}, **counted, **progress.rates()}

    with _stop_signal() as stopping, jax.set_mesh(mesh), phases, trace:
        while done < loop.steps:
            trace.at(done - begin + 1)
            with phases("data"):
                batch = shard.place(source.next(state), mesh)
                tokens = count_tokens([x for n, x in tree.flat(batch).items() if n.split("/")[-1] == "segments"])
            with phases("step"), jax.profiler.StepTraceAnnotation(name, step_num=done + 1):
                state, metrics = step(state, frozen, batch)
                metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
            done += 1
            numbers = {**metrics, "num_tokens": int(tokens), **getattr(source, "metrics", dict)()}
            bad = metrics["skipped"] > 0
            skipped = {"in_a_row": skipped["in_a_row"] + 1 if bad else 0, "total": skipped["total"] + bad}
            if bad:
                log.event("skipped_step", step=done, loss=metrics["loss"], grad_norm=metrics["grad_norm"], in_a_row=skipped["in_a_row"])
            last = done == loop.steps
            evaluated = evaluate is not None and (last or (loop.eval_every > 0 and done % loop.eval_every == 0))
            if evaluated:
                with phases("eval"), progress.paused():
                    numbers |= {f"eval/{k}": v for k, v in evaluate(state).items()}
            # What an evaluation or a rollout says is said once: such a step is logged, whatever log_every is.
            due = last or done % loop.log_every == 0 or bad or evaluated or getattr(source, "collected", False)
            if due:
                log.metrics(done, numbers)
            for e in getattr(source, "events", list)():
                log.event(e["kind"], step=done, **{k: v for k, v in e.items() if k != "kind"})
            if rows := getattr(source, "samples", list)():
                log.samples(done, rows)
            progress.update(done, metrics["loss"], int(tokens))
            if skipped["in_a_row"] >= loop.max_skipped:
                raise UserError(f"{name}: {skipped['in_a_row']} steps in a row had a loss or gradient that is not finite, the last at step {done}; params are those before them. Lower optim.lr, or look for the batch in {log.workdir}/events.jsonl")
            stop = stopping()
            saves = checkpoints is not None and (last or stop or (loop.save_every and done % loop.save_every == 0))
            if saves:
                save()
            if due or saves:
                log.timings(done, timings())
            if stop:
                log.event("interrupted", step=done)
                raise Interrupted()
        progress.close(summary(timings()))
    return state
