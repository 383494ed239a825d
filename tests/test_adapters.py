"""Stages with adapters: what trains, what is held, what is written, and gone on with after a kill."""

import json

import jax
import numpy as np
import pytest
import runs
from jaxalign import build, tree
from jaxalign.models import lora, peft
from jaxalign.train import checkpoint
from jaxalign.train.log import read_jsonl
from jaxalign.types import UserError


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    with runs.devices(2):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.prepared(tmp_path_factory.mktemp("data"))


def config(kind, data, **over):
    over = {"adapter.rank": 2, "optim.lr": 1e-2, **over}
    return runs.config(kind, data, **{k: v for k, v in over.items() if v is not None})


def made(c, workdir):
    name, section = next(iter(build.stages(c).items()))
    return build.make_stage(build.world(c, workdir), name, section, workdir)


def saved(directory, name="params"):
    return checkpoint.load_tree(directory / name, checkpoint.structure(directory / name))[0]


def held() -> int:
    """Bytes of all live device buffers, each once."""
    seen = {s.data.unsafe_buffer_pointer(): s.data.nbytes for x in jax.live_arrays() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for s in x.addressable_shards}
    return sum(seen.values())


@pytest.mark.parametrize("kind, quantise", [("lm", "nf4"), ("reward", ""), ("dpo", "int8"), ("ppo", "nf4")])
def test_a_stage(kind, quantise, data, tmp_path):
    """Only adapters and heads move; STAGE/params is the merged whole, and STAGE/adapter on the same base says the same."""
    c = config(kind, data, **{"adapter.quantise": quantise, "adapter.dora": kind == "lm", "data.accumulate": 2})
    if kind in ("lm", "reward"):
        c.stage.init = str(data / "start")
    s = made(c, tmp_path)
    trained = set(tree.flat(s.params))
    heads = {k for k in trained if k.split("/")[-1] in ("weight", "bias")}
    assert heads == {"reward": {"head/weight", "head/bias"}, "ppo": {"value/weight", "value/bias"}}.get(kind, set())
    assert {k.split("/")[-1] for k in trained - heads} == {"a", "b"} | ({"magnitude"} if kind == "lm" else set())
    before = jax.tree.map(np.asarray, s.base)
    params = s.go()
    s.save(params)
    jax.tree.map(np.testing.assert_array_equal, s.base, before)
    start, end = saved(data / "start"), saved(tmp_path)
    policy = end["trunk"] if kind == "reward" else end
    assert jax.tree.map(lambda x: (x.shape, x.dtype), policy) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    np.testing.assert_array_equal(policy["embed"], start["embed"])
    assert np.abs(np.asarray(policy["layers"]["q"]) - start["layers"]["q"]).max() > 1e-4
    dense = build.load_params(s.world, str(data / "start"), s.world.model.specs(), "test")
    again = lora.quantise(dense, ((lora.MATRICES, quantise),)) if quantise else dense
    again = peft.load(tmp_path / "adapter", s.world.model, again, head=end["head"] if kind == "reward" else None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), lora.merge(again[0] if kind == "reward" else again), policy)
    memory = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"] == "memory"]
    assert memory and memory[0]["trained"] == lora.nbytes(s.params) and memory[0]["frozen"] == lora.nbytes(s.base)
    losses = [m["loss"] for m in read_jsonl(tmp_path / "metrics.jsonl")]
    assert np.isfinite(losses).all() and len(set(losses)) > 1


def test_a_reward_model_on_bert(data, tmp_path):
    """Its pooler is drawn anew, so it trains whole beside the adapters, and is in the adapter's directory."""
    c = config("reward", data, **{"adapter.targets": "/(q|v)/w$"})
    c.model = build.base("bert", family="bert", vocab=300, dim=16, layers=1, heads=2, hidden=32, max_len=64).model
    s = made(c, tmp_path)
    pooler = {"trunk/pooler/w", "trunk/pooler/b"}
    assert {k for k in tree.flat(s.params) if "/layers/" not in k} == {"head/weight", "head/bias"} | pooler
    start = jax.tree.map(lambda x: jax.numpy.array(np.asarray(x)), lora.base(tree.merge(s.params, s.base)))
    params = s.go()
    s.save(params)
    end = saved(tmp_path)
    assert all(np.abs(tree.flat(end)[k] - tree.flat(start)[k]).max() > 1e-4 for k in pooler)
    trunk, head = peft.load(tmp_path / "adapter", s.world.model, start["trunk"], head=start["head"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), {"trunk": lora.merge(trunk), "head": head}, end)
    c.stage.adapter.update({"rank": 0, "targets": "", "path": str(tmp_path)})
    on = made(c, tmp_path / "on")
    on = tree.merge(on.params, on.base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), on["trunk"]["pooler"], end["trunk"]["pooler"])


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_the_reference_costs_nothing(kind, data, tmp_path):
    """It is the frozen tree: the same buffers. With a reference of its own by name, a second model is held."""
    begin = held()
    s = made(config(kind, data), tmp_path)
    free = held() - begin
    model = 4 * sum(int(np.prod(x.shape)) for x in jax.tree.leaves(saved(data / "start")))
    reference = s.source.params if kind == "dpo" else s.source.reference
    own = {id(x) for x in jax.tree.leaves((s.params, s.frozen))}
    assert len(jax.tree.leaves(reference)) == len(jax.tree.leaves(saved(data / "start"))) and all(id(x) in own for x in jax.tree.leaves(reference))
    assert not any(x.is_deleted() for x in jax.tree.leaves(reference))
    s2 = made(config(kind, data, **{"reference" if kind == "dpo" else "rl.reference": str(data / "start")}), tmp_path)
    assert held() - begin - free >= free + model  # at least one copy more
    assert free < 2 * (1.5 * model)  # the model once on each device, and small adapters
    del s2
    s.go()
    first = read_jsonl(tmp_path / "metrics.jsonl")[0]
    if kind == "dpo":
        np.testing.assert_allclose([first["rewards/chosen"], first["rewards/rejected"], first["rewards/margins"]], 0, atol=1e-5)
        np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-5)
    else:
        np.testing.assert_allclose([first["objective/kl"], first["logprob_gap"]], 0, atol=1e-5)
        np.testing.assert_allclose(first["val/ratio"], 1, rtol=1e-5)


def test_a_critic_of_its_own(data, tmp_path):
    """Adapters on the reward model too, whose buffers the scorer shares."""
    runs.train(runs.config("reward", data), tmp_path / "reward")
    s = made(config("ppo", data, **{"rl.reward": str(tmp_path / "reward"), "rl.value": "reward"}), tmp_path / "ppo")
    assert {k for k in tree.flat(s.params["value"]) if "/layers/" not in k} == {"head/weight", "head/bias"}
    s.go()
    assert len(read_jsonl(tmp_path / "ppo" / "metrics.jsonl")) == runs.STEPS
    s.save(s.adapted)  # not what a run would save, but a directory to start from
    with pytest.raises(UserError, match="needs adapter.rank"):
        made(config("ppo", data, **{"rl.reward": str(tmp_path / "reward"), "rl.value": "reward", "adapter.rank": 0, "adapter.path": str(tmp_path / "ppo")}), tmp_path / "two")


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_killed_and_resumed(kind, data, tmp_path, monkeypatch):
    """Bit for bit, adapter file included; another base is refused."""
    c = lambda **k: config(kind, data, **{"adapter.quantise": "nf4", **k})
    runs.train(c(), tmp_path / "whole")

    runs.killed(5, lambda: runs.train(c(), tmp_path / "cut"))
    other = saved(data / "start")
    other["layers"]["q"] = other["layers"]["q"] + 1e-3
    checkpoint.save_tree(tmp_path / "other" / "params", other, {})
    monkeypatch.setattr(build, "load_params", lambda w, where, specs, what, load=build.load_params: load(w, str(tmp_path / "other"), specs, what))
    with pytest.raises(UserError, match="frozen was"):
        runs.train(c(), tmp_path / "cut")
    monkeypatch.undo()
    runs.train(c(), tmp_path / "cut")
    assert runs.facts(tmp_path / "cut") == runs.facts(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "cut" / "adapter" / name).read_bytes() == (tmp_path / "whole" / "adapter" / name).read_bytes()


def test_from_an_adapter(data, tmp_path):
    """A second stage goes on with the first one's adapter, on the same base; the merged params begin where it ended."""
    runs.train(config("dpo", data), tmp_path / "one")
    s = made(config("dpo", data, **{"adapter.rank": 0, "adapter.path": str(tmp_path / "one")}), tmp_path / "two")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), lora.merge(tree.merge(s.params, s.base)), saved(tmp_path / "one"))
    reference = s.source.params
    jax.tree.map(np.testing.assert_array_equal, reference, saved(data / "start"))


def test_evaluation_reads_the_merged_weights(data, tmp_path):
    from jaxalign.cli.eval import _objective

    c = config("dpo", data, **{"adapter.quantise": "int8", "data.eval_path": str(data / "pairs.jsonl")})
    s, _ = runs.train(c, tmp_path)
    got = _objective(s.world, c.stage, "dpo")
    last = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    np.testing.assert_allclose(got["rewards/margins"], last["eval/rewards/margins"], atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"adapter.rank": 0, "adapter.quantise": "nf4"}, "nothing would train; set adapter.rank"),
        ({"adapter.quantise": "int3"}, "'int3' is unknown"),
        ({"adapter.path": "x"}, "set adapter.rank to 0"),
        # What nothing would read is refused: without adapters every weight would train, and not a word be said of it.
        ({"adapter.rank": 0, "adapter.dora": True}, "adapter.dora True with adapter.rank 0: every weight would be trained"),
        ({"adapter.rank": 0, "adapter.targets": "/q$", "adapter.rslora": True, "adapter.alpha": 8.0}, "alpha 8.0, adapter.targets '/q.', adapter.rslora True"),
        ({"adapter.rank": 0, "adapter.path": "x", "adapter.dora": True}, "adapter.dora True .* adapter.path brings its own"),
        ({"adapter.rank": 0, "adapter.path": "x", "adapter.targets": "/q$"}, "adapter.targets .* adapter.path brings its own"),
        ({"adapter.rank": 0, "adapter.patterns": (("/q$", 2, 4.0),), "adapter.targets": "/v$"}, "adapter.targets .* each of adapter.patterns has its own"),
        ({"adapter.rank": -1}, "rank -1"),
        ({"adapter.alpha": 0.0}, "alpha 0"),
        ({"adapter.targets": "quack"}, "'quack' matches no parameter"),
        ({"adapter.targets": "embed"}, "tied"),
        ({"adapter.rank": 0, "adapter.path": "nowhere"}, "nowhere/adapter_config.json"),
    ],
)
def test_wrong_sections(fields, message, data, tmp_path):
    with pytest.raises(UserError, match=message):
        made(config("dpo", data, **fields), tmp_path)


def test_patterns_have_ranks_of_their_own(data, tmp_path):
    c = config("dpo", data, **{"adapter.targets": "/(q|v)$", "adapter.patterns": (("/down$", 1, 4.0),), "adapter.rslora": True})
    s, _ = runs.train(c, tmp_path)
    assert {k: v["b"].shape[-2] for k, v in lora.adapters(s.adapted).items()} == {"layers/q": 2, "layers/v": 2, "layers/down": 1}
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {"down_proj": 1} and written["alpha_pattern"] == {"down_proj": 4} and written["use_rslora"] and written["base_model_name_or_path"] == str(data / "start")
