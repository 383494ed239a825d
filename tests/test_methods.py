"""What holds for every method of `methods.OBJECTIVES`, built from a config as its users build it: eight devices and micro-batches
change nothing, what is stopped goes on with the same bits, and there is a page about it."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from jaxalign import build, methods, shard, tree
from jaxalign.train import step
from jaxalign.types import UserError

ONE = {"data": 1}
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}
MAKE = shard.make_mesh
OWN = {"masked_lm": {"mask_id": 3}, "span_corruption": {"sentinel_id": 200, "eos_id": 257}}  # what a method cannot guess
FILES = {"tokens": "text", "pairs": "pairs", "rankings": "rankings", "labelled": "labelled", "steps": "steps", "trajectories": "trajectories", "prompts": "prompts"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.prepared(tmp_path_factory.mktemp("data"))


def config_of(name: str, data: Path):
    """The smallest stage of a method, with nothing of its own said but where things lie."""
    m = methods.OBJECTIVES[name]
    two_sided = name == "span_corruption"
    shape = dict(family="t5", head_dim=8, start=258) if two_sided else dict(max_len=64)
    c = build.base(name, vocab=0, dim=16, layers=1, heads=2, hidden=32, **shape)
    c.tokenizer.template = "encoder_decoder" if two_sided else "plain"
    sections = {"objective": OWN.get(name, {}), "init": "" if two_sided else str(data / "start"), "data": {"path": f"{data}/{FILES[m.kind]}.jsonl", "batch_size": 8}}
    if m.kind == "tokens":
        sections["data"]["seq_len"] = 32
    if m.kind == "prompts":
        sections |= {"rl": {"reward": "runs:length_reward"}, "sampling": {"max_new": 6}}
    if methods.has_teacher(m.maker):
        sections["teacher"] = str(data / "other")
    c.stage = build.stage(name, **sections, train={"steps": 3, "save_every": 1, "keep": 3}, optim={"lr": 3e-3})
    return c


def begun(name: str, data: Path, directory: Path, mesh: dict, monkeypatch):
    monkeypatch.setattr(shard, "make_mesh", lambda sizes: MAKE(mesh, jax.devices()[: int(np.prod(list(mesh.values())))]))
    c = config_of(name, data)
    s = build.make_stage(build.world(c, directory), name, c.stage, directory)
    return s, s.begin()[0]


def gradient(s, state, frozen, batch, mesh, accumulate):
    go = jax.jit(functools.partial(step.gradient, s.objective, accumulate=accumulate))
    with jax.set_mesh(mesh):
        # One program at a time: simulated devices share a few threads, and two programs under way may wait for one another.
        args = jax.block_until_ready((state.params, frozen, state.aux, shard.place(batch, mesh), state.key))
        loss, metrics, grads = jax.block_until_ready(go(*args))
    return float(loss), {k: float(v) for k, v in metrics.items()}, {k: np.asarray(shard.to_host(x)) for k, x in tree.flat(grads).items()}


@pytest.mark.parametrize("name", methods.OBJECTIVES)
def test_eight_devices_and_micro_batches(name, data, tmp_path, monkeypatch):
    """The very same batch, drawn on the mesh: whole on eight devices, and in two micro-batches on one."""
    s, state = begun(name, data, tmp_path, EIGHT, monkeypatch)
    with jax.set_mesh(s.world.mesh):
        batch = jax.block_until_ready(s.source.next(jax.block_until_ready(state)))
    loss, metrics, grads = gradient(s, state, s.frozen, batch, s.world.mesh, 1)
    one = MAKE(ONE, jax.devices()[:1])
    host = lambda t: jax.tree.map(lambda x: np.asarray(shard.to_host(x)) if isinstance(x, jax.Array) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, t)
    alone = jax.device_put(host(state.replace(key=None)), shard.replicated(one)).replace(key=jax.random.key(0))
    want, want_metrics, want_grads = gradient(s, alone, jax.device_put(host(s.frozen), shard.replicated(one)), host(batch), one, 1 if s.objective.whole_batch else 2)
    assert any(np.abs(g).max() > 0 for g in want_grads.values())
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
    for k, v in want_metrics.items():
        np.testing.assert_allclose(metrics[k], v, rtol=1e-4, atol=1e-5, err_msg=k)
    scale = max(np.abs(g).max() for g in want_grads.values())
    for k, g in want_grads.items():
        np.testing.assert_allclose(grads[k], g, rtol=1e-4, atol=1e-5 * scale, err_msg=k)


# The others have no state but params, optimizer and a position in a file, which tests/test_resume.py stops everywhere; one of each kind stands for them.
ALONE = {"lm", "dpo", "orpo", "kto", "pl_dpo", "reward_steps", "filtered_bc", "distill"}
STATEFUL = [n for n, m in methods.OBJECTIVES.items() if m.kind == "prompts" or m.twins is not None or n in ("tr_dpo", "bco_pair", "mpo", "bco", "bco_matched") or n in ALONE]


@pytest.mark.parametrize("name", STATEFUL)
def test_stopped_and_resumed(name, data, tmp_path, monkeypatch):
    """Stopped after the second step, gone on with by fresh objects: weights and numbers are those of a run that was not."""
    monkeypatch.setattr(shard, "make_mesh", lambda sizes: MAKE(ONE, jax.devices()[:1]))
    go = lambda directory: runs.train(config_of(name, data), directory)
    go(tmp_path / "whole")
    runs.killed(2, lambda: go(tmp_path / "killed"))
    go(tmp_path / "killed")
    whole, killed = (runs.facts(tmp_path / d) for d in ("whole", "killed"))
    assert killed == whole


@pytest.mark.parametrize("name", methods.OBJECTIVES)
def test_has_a_page(name):
    text = (runs.ROOT / "docs" / "methods" / f"{name}.md").read_text()
    for part in ("equation", "function", "config", "metric", "works", "source"):
        assert part in text.lower(), part


TWO = {"reward": "runs:length_reward,runs:length_reward", "combine": "apart", "weights": (1.0, 2.0)}


@pytest.mark.parametrize(
    "name, rl, said",
    [
        *((n, TWO, "rl.combine apart is for") for n in ("ppo", "reinforce_pp", "online_dpo")),
        ("grpo", {**TWO, "reward": "runs:length_reward", "weights": (1.0,)}, "two or more rewards"),
        ("nash_md", {"staleness": 1}, "no correction for answers of an older policy"),
        ("reinforce_pp", {"baseline": "group", "group": 1}, "rl.group 1"),
        ("nlpo", {"scale_score": "running"}, None),
        ("nlpo", {"missing_eos_value": -1.0}, None),
        ("dapo", TWO, None),
    ],
)
def test_what_goes_together(name, rl, said, data, tmp_path, monkeypatch):
    """Settings of different methods run together, or are refused before anything runs."""
    monkeypatch.setattr(shard, "make_mesh", lambda sizes: MAKE(ONE, jax.devices()[:1]))
    c = config_of(name, data)
    c.stage.rl.update({"reward": "runs:length_reward", **rl})
    c.stage.train.steps = 1
    if said is None:
        runs.train(c, tmp_path)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    else:
        with pytest.raises(UserError, match=said):
            build.make_stage(build.world(c, tmp_path), name, c.stage, tmp_path)
