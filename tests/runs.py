"""Small data, small configs, whole runs: what the tests of training as a whole share."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
STEPS = 7  # no multiple of anything below, so that every boundary is crossed

# What a child process gets: quick compiles, kept for the next child.
ENV = {
    **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")},
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/jaxalign-tests")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def length_reward(prompt, completion, record):
    """A Python reward, named by import path ("runs:length_reward")."""
    return len(completion) / 10 + prompt.count("a") / 7


def lame_reward(prompt, completion, record):
    """Not a number, in process 1 alone."""
    return float("nan") if os.environ.get("JAXALIGN_PROCESS", "0")[0] == "1" else 1.0


@contextlib.contextmanager
def devices(n: int):
    """Meshes of the first n devices: quicker to compile for than the eight of conftest.py."""
    import jax  # not above: this file is a child's config, read before jax.distributed is up
    import pytest
    from jaxalign import shard

    make = shard.make_mesh
    with pytest.MonkeyPatch.context() as m:
        m.setattr(shard, "make_mesh", lambda sizes: make(sizes, jax.devices()[:n]))
        yield


def prepared(directory: Path) -> Path:
    """`directory` with the data of all kinds, and a model for those that start from one."""
    write_data(directory)
    start(directory)
    return directory


def write_data(directory: Path) -> None:
    """Texts, demonstrations, rankings, pairs and prompts of a handful of bytes each."""
    words = ["bread", "soup", "tea", "rice", "salt", "plum", "fig", "oat"]
    pick = np.random.default_rng(0).choice
    say = lambda n: " ".join(pick(words, n))  # noqa: E731
    files = {
        "text": [{"text": say(4)} for _ in range(60)],
        "sft": [{"prompt": say(1) + ":", "completion": " " + say(2)} for _ in range(40)],
        "rankings": [{"prompt": say(1) + ":", "completions": [f" {say(2)} {k}" for k in range(3)], "ranks": [0, 1, 1]} for _ in range(24)],
        "pairs": [{"prompt": say(1) + ":", "chosen": f" {say(1)} yes", "rejected": f" {say(1)} no"} for _ in range(40)],
        "prompts": [{"prompt": say(1) + ":"} for _ in range(24)],
        "labelled": [{"prompt": say(1) + ":", "completion": f" {say(1)} {'no yes'.split()[i % 2]}", "label": i % 2 == 1} for i in range(40)],
        "steps": [{"prompt": say(1) + ":", "steps": [say(1), say(2)], "labels": [True, k % 2 == 0]} for k in range(40)],
        "trajectories": [{"prompt": say(1) + ":", "completion": f" {say(2)}", "reward": i % 3 - 1.0} for i in range(40)],
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def config(kind: str, data: Path, **over):
    """A one-stage config of the smallest model, `kind` being lm, reward, dpo or ppo. `over`: {"data.batch_size": 4}."""
    from jaxalign import build

    c = build.base(kind, vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    sections = {
        "lm": dict(data=dict(path=f"{data}/text.jsonl", batch_size=8, seq_len=32)),
        "reward": dict(data=dict(path=f"{data}/rankings.jsonl", batch_size=8)),
        "dpo": dict(init=str(data / "start"), data=dict(path=f"{data}/pairs.jsonl", batch_size=8)),
        "ppo": dict(
            init=str(data / "start"),
            data=dict(path=f"{data}/prompts.jsonl", batch_size=16),
            rl=dict(reward="runs:length_reward", epochs=2, minibatches=2, target=0.02, horizon=100.0, mix=dict(path=f"{data}/text.jsonl", batch_size=8, seq_len=32)),
            sampling=dict(max_new=8),
        ),
        "grpo": dict(
            init=str(data / "start"),
            data=dict(path=f"{data}/prompts.jsonl", batch_size=4),
            rl=dict(reward="runs:length_reward", group=4, epochs=2, minibatches=2),
            sampling=dict(max_new=8),
        ),
        "distill": dict(teacher=str(data / "teacher"), data=dict(path=f"{data}/sft.jsonl", eval_path=f"{data}/sft.jsonl", batch_size=8, seq_len=32)),
    }[kind]
    mix = sections.get("rl", {}).pop("mix", {})
    c.stage = build.stage(kind, **sections, train=dict(steps=STEPS, save_every=3), optim=dict(lr=3e-3, warmup=2))
    if mix:
        c.stage.rl.mix.update(mix)
        c.stage.objective.ptx_coef = 0.3
    for k, v in over.items():
        at, *rest = c.stage, *k.split(".")
        for part in rest[:-1]:
            at = at[part]
        at[rest[-1]] = v
    return c


def start(data: Path) -> None:
    """data/start: weights that DPO and PPO begin with, and refer to. data/other: others of the same shape, to learn from."""
    import jax

    from jaxalign import build
    from jaxalign.ops import nn
    from jaxalign.train import checkpoint

    w = build.world(config("lm", data), data)
    for name, seed in (("start", 1), ("other", 2)):
        checkpoint.save_tree(data / name / "params", nn.init(w.model.specs(), jax.random.key(seed)), {})


def train(c, workdir: Path):
    """One stage in this process, from fresh objects: the stage, and its trained weights."""
    from jaxalign import build

    name, section = next(iter(build.stages(c).items()))
    s = build.make_stage(build.world(c, workdir), name, section, workdir)
    params = s.go()
    s.save(params)
    return s, params


def killed(step: int, go) -> None:
    """Calls go() and ends it, as the death of the process would, right after the metric line of `step` is on disk."""
    import pytest
    from jaxalign.train.log import RunLog

    class Killed(BaseException):
        """What no handler of the program catches."""

    original = RunLog.metrics

    def metrics(self, at, values):
        original(self, at, values)
        if at == step:
            raise Killed

    with pytest.MonkeyPatch.context() as m, pytest.raises(Killed):
        m.setattr(RunLog, "metrics", metrics)
        go()


def command(*args: str, **env: str) -> tuple[list[str], dict]:
    return [sys.executable, "-m", "jaxalign", *args], {**ENV, **env}


def jaxalign(*args: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    argv, environment = command(*args, **env)
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=timeout)


def weights(directory: Path) -> dict[str, str]:
    """{name: SHA-256 of its bytes} of a saved tree."""
    from jaxalign import tree
    from jaxalign.train import checkpoint

    arrays, _ = checkpoint.load_tree(directory, checkpoint.structure(directory))
    return {k: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for k, x in tree.flat(arrays).items()}


def facts(workdir: Path) -> dict:
    """Everything of a run that must be the same, run after run, killed or not."""
    return {"weights": weights(workdir / "params"), **{n: (workdir / n).read_bytes() for n in ("metrics.jsonl", "samples.jsonl")}}


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def get_config(arg: str):
    """`--config=tests/runs.py:KIND:DATA`, for child processes."""
    kind, data = arg.split(":", 1)
    return config(kind, Path(data))
