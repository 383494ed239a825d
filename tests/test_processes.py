"""Two processes of four simulated devices each, and four of two, started by the command itself, follow one process on one device."""

import json
import math
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import runs
from jaxalign.cli import launch
from jaxalign.cli import main as cli
from jaxalign.train import checkpoint

STEPS = 20


FLAGS = {
    "lm": ("--config.stage.optim.schedule=constant",),
    "dpo": (),
    # Greedy: a sampled near-tie could flip. Rewards, KL to the reference and both epochs follow from the same tokens.
    "ppo": ("--config.stage.sampling.temperature=0", "--config.stage.optim.lr=3e-4"),
}
MESH = {
    "lm": ("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"),  # fsdp runs across the processes
    "dpo": ("--config.mesh.data=2", "--config.mesh.fsdp=4"),
    "ppo": ("--config.mesh.data=2", "--config.mesh.fsdp=4"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.prepared(tmp_path_factory.mktemp("data"))


def arguments(kind: str, data: Path, workdir: Path, *more: str) -> list[str]:
    return ["train", f"--config={runs.__file__}:{kind}:{data}", f"--workdir={workdir}", f"--config.stage.train.steps={STEPS}", "--config.stage.train.save_every=10", *FLAGS[kind], *more]


def two(kind: str, data: Path, workdir: Path, *more: str, processes: int = 2) -> subprocess.Popen:
    argv, env = runs.command(*arguments(kind, data, workdir, f"--processes={processes}", *more), JAX_NUM_CPU_DEVICES=str(8 // processes))
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """kind -> the directory of the same run by one process on one device."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind)
            with runs.devices(1):
                cli.run(["jaxalign", *arguments(kind, data, done[kind])])
        return done[kind]

    return run


def follows(a: list[dict], b: list[dict], absolute: float = 1e-6) -> None:
    """The same numbers at the same steps, to 1e-5 of themselves; `absolute` for sums that cancel."""
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x:
            if k == "rewards/accuracies" and x["step"] == 1:
                continue  # the policy is still the reference: every margin is 0, and its sign is rounding
            assert math.isclose(x[k], y[k], rel_tol=1e-5, abs_tol=absolute), (x["step"], k, x[k], y[k])


@pytest.mark.parametrize("kind", MESH)
def test_two_processes_follow_one(kind, data, alone, tmp_path):
    process = two(kind, data, tmp_path / "two", *MESH[kind])
    one = alone(kind)
    if kind == "lm":  # SIGTERM to the command reaches both; they save the same step, say 143, and go on from it
        while not (tmp_path / "two/metrics.jsonl").exists() or len(metrics(tmp_path / "two")) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.terminate()
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 143, out
        points = checkpoint.Checkpoints(tmp_path / "two/checkpoints")
        assert points.latest() == len(metrics(tmp_path / "two")) >= 3
        process = two(kind, data, tmp_path / "two", *MESH[kind])
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    # Whitened advantages sum to 0, so the policy loss is what rounding leaves of terms of size 1.
    follows(metrics(tmp_path / "two"), metrics(one), 1e-5 if kind == "ppo" else 1e-6)
    assert json.loads((tmp_path / "two/environment.json").read_text())["processes"] == 2
    assert out.count(f"{kind} {STEPS}/{STEPS} |") == 1  # process 0 alone reports
    if kind == "ppo":  # the samples are greedy, so they are the same texts with the same scores
        assert (tmp_path / "two/samples.jsonl").read_bytes() == (one / "samples.jsonl").read_bytes() != b""
    if kind == "lm":  # what two processes saved, one restores onto eight devices, and follows
        for gone in ("checkpoints/20", "params"):
            shutil.rmtree(tmp_path / "two" / gone)
        cli.run(["jaxalign", *arguments(kind, data, tmp_path / "two")])
        follows(metrics(tmp_path / "two"), metrics(one))
        assert [json.loads(e)["step"] for e in (tmp_path / "two/events.jsonl").read_text().splitlines() if '"resume"' in e][-1] == 10


def test_four_processes_follow_one(data, alone, tmp_path):
    """fsdp across pairs of them, rows over all; the optimizer's state in the host's memory. Every process writes its shards of
    the checkpoint, and one process reads them."""
    process = two("lm", data, tmp_path, "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.stage.train.steps=4", "--config.stage.optim.offload=true", processes=4)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    follows(metrics(tmp_path), metrics(alone("lm"))[:4])
    assert json.loads((tmp_path / "environment.json").read_text())["processes"] == 4 and out.count("goodput") == 1
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").latest_good() == (4, {})
    assert runs.weights(tmp_path / "params").keys() == runs.weights(alone("lm") / "params").keys()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def widow(data, tmp_path_factory):
    """(process 0, when process 1 was killed): as on a cluster, where nobody stands above the two."""
    directory, port = tmp_path_factory.mktemp("widow"), free_port()
    argv, env = runs.command(*arguments("lm", data, directory, *MESH["lm"], "--config.stage.train.steps=100000"), JAX_NUM_CPU_DEVICES="4")
    both = [subprocess.Popen(argv, env={**env, launch.ENV: f"{i}/2/127.0.0.1:{port}"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not (directory / "metrics.jsonl").exists() or len(metrics(directory)) < 3:
            assert time.monotonic() < deadline and all(p.poll() is None for p in both)
            time.sleep(0.02)
        both[1].kill()
        yield both[0], time.monotonic()
    finally:
        for p in both:
            p.kill()
            p.communicate()


def test_a_tensor_axis_across_processes(data, alone, widow, tmp_path):
    """Both processes then feed the same rows (`shard.local_rows`). Meanwhile `widow` finds out."""
    process = two("lm", data, tmp_path, "--config.stage.train.steps=4", "--config.mesh.data=1", "--config.mesh.tensor=8")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    follows(metrics(tmp_path), metrics(alone("lm"))[:4])


def test_a_process_that_dies_ends_the_other(widow):
    """SIGKILL to process 1 ends process 0, with an error, within a minute."""
    process, died = widow
    out, _ = process.communicate(timeout=max(1.0, 60 - (time.monotonic() - died)))
    assert process.returncode not in (0, None), out


def test_an_error_in_one_process_ends_both(data, tmp_path):
    process = two("ppo", data, tmp_path, *MESH["ppo"], "--config.stage.rl.reward=runs:lame_reward")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    assert out.count("reward function lame_reward returned nan for row") == 1 and not (tmp_path / "params").exists()


def test_a_pipeline_in_two_processes(tmp_path):
    """Sampling, labelling, normalising the rewards and evaluating see the rows of both, in their order."""
    small = dict(pretrain=200, sft=60, sft_eval=8, prompts=20, prompts_eval=12)
    flags = [f"--config.world.sizes.{k}={v}" for k, v in small.items()]
    flags += ["--config.order=('sft', 'reward')", "--config.stages.sft.init=", "--config.tokenizer.kind=bytes", "--config.tokenizer.train_on=", "--config.model.vocab=0"]
    flags += [f"--config.stages.{stage}.train.steps=2" for stage in ("sft", "reward")]
    flags += ["--config.world.ranked=6", "--config.world.ranked_eval=6", "--config.world.samples=16", "--config.world.sampling.max_new=4", "--config.stages.sft.data.seq_len=256", "--config.model.max_len=256"]
    results = []
    for n in (1, 2):
        done = runs.jaxalign("pipeline", f"--config={runs.ROOT}/configs/quickstart.py:smoke", f"--workdir={tmp_path}/{n}", f"--processes={n}", *flags, JAX_NUM_CPU_DEVICES="2" if n == 1 else "1")
        assert done.returncode == 0, done.stdout + done.stderr
        rankings = [json.loads(line) for line in (tmp_path / str(n) / "data/rankings.jsonl").read_text().splitlines()]
        results.append((rankings, json.loads((tmp_path / str(n) / "evaluation.json").read_text())))
    (rankings, one), (others, two) = results
    assert [r["prompt"] for r in rankings] == [r["prompt"] for r in others] != []
    assert [r["completions"] for r in rankings] == [r["completions"] for r in others]
    for name in ("reward", "policies"):
        assert one[name].keys() == two[name].keys()
    assert [one["reward"][k] for k in ("pairs", "prompts")] == [two["reward"][k] for k in ("pairs", "prompts")]
    assert math.isclose(one["reward"]["accuracy"], two["reward"]["accuracy"], abs_tol=0.05)
    assert math.isclose(one["policies"]["sft"]["gold"], two["policies"]["sft"]["gold"], rel_tol=1e-3)
