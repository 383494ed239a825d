"""A stage of shapes is the stage that trains: the same programs, the same bytes. And what a plan says of both."""

import types

import jax
import numpy as np
import pytest
import runs
from jaxalign import build, chips, shard
from jaxalign.models import decoder
from jaxalign.plan import programs, roofline, search
from jaxalign.types import UserError

CHIP = chips.Chip("toy", ("toy",), 1e12, 2**30, 1e11, 1e10, 4, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.prepared(tmp_path_factory.mktemp("data"))


def shapes_of(kind, data):
    """A config whose data have the lengths that it says."""
    c = runs.config(kind, data)
    c.mesh.data, c.mesh.fsdp = 1, 2
    c.model.vocab = 259  # the bytes and their specials; a plan asks no tokenizer
    lengths = {"dpo": ("max_len", 24), "reward": ("max_len", 24), "ppo": ("max_prompt_len", 16)}
    if kind in lengths:
        c.stage.data[lengths[kind][0]] = lengths[kind][1]
    if kind == "reward":
        c.stage.data.max_k = 3
    if kind == "dpo":
        c.stage.data.share_prompt = False  # whether it pays depends on prompts that a plan does not know
    return c


@pytest.mark.parametrize("kind", ["lm", "reward", "dpo"])
def test_the_step_is_the_one_that_trains(kind, data, tmp_path):
    """Word for word, from arrays and from shapes; and the devices hold as many bytes as was said."""
    c = shapes_of(kind, data)
    with runs.devices(2):
        real = build.make_stage(build.world(c, tmp_path), kind, c.stage, tmp_path)
    it = programs.iteration(programs.stage(c, kind, c.stage, jax.devices()[:2]))
    mesh = real.world.mesh
    with jax.set_mesh(mesh):
        state, step = real.begin()
        batch = jax.device_put(shard.place(real.source.next(state), mesh), shard.batch_sharding(mesh))  # one spelling of the same cut
        text = step.lower(state, real.frozen, batch).as_text()
    assert it.programs[-1].lower(mesh).as_text() == text
    held = sum(s.data.nbytes for x in jax.tree.leaves((state.params, state.opt_state)) for s in x.addressable_shards[:1])
    assert programs.shares({k: it.resident[k] for k in ("params", "optimizer")}) == pytest.approx({"params": held / 3, "optimizer": 2 * held / 3}, rel=0.01)
    assert it.tokens == sum(x.size for x in (b.tokens for b in jax.tree.leaves(batch, is_leaf=lambda b: hasattr(b, "tokens")) if hasattr(b, "tokens")))


@pytest.fixture(scope="module")
def ppo(data):
    """PPO with a reward model, a critic of its own and a reference: four networks and Adam for two of them."""
    c = shapes_of("ppo", data)
    c.stage.rl.reward, c.stage.rl.value, c.stage.objective.ptx_coef = "reward", "reward", 0.0
    s = programs.stage(c, "ppo", c.stage, jax.devices()[:2])
    return c, s, programs.iteration(s)


def test_ppo_holds_four_networks(ppo):
    c, s, it = ppo
    one = programs.per_device(jax.tree.leaves(shard.abstract(s.world.model.specs(), s.world.mesh)))
    got = programs.shares(it.resident)
    assert [p.name for p in it.programs] == ["generate", "score", "experience", "step"]
    assert [p.times for p in it.programs] == [1, 1, 1, c.stage.rl.epochs * c.stage.rl.minibatches]
    for part, networks in {"params": 2, "optimizer": 4, "reference": 1, "reward": 1}.items():
        assert got[part] == pytest.approx(networks * one, rel=0.02), part
    T = 16 + c.stage.sampling.max_new
    assert it.cache == c.stage.data.batch_size * (2 * T * 16 * 4 + T * 4) + 4  # keys and values [B,T,16] in f32, one layer; segments, length
    assert it.tokens == c.stage.data.batch_size * c.stage.sampling.max_new


def test_bytes_of_a_device():
    """A quarter of [8,6] in f32, the whole of [5] in bf16, and nothing of what lies on the host."""
    mesh = shard.make_mesh({"data": 1, "fsdp": 4}, jax.devices()[:4])
    cut, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*p)) for p in (("fsdp",), ()))
    of = jax.ShapeDtypeStruct
    leaves = [of((8, 6), np.float32, sharding=cut), of((5,), jax.numpy.bfloat16, sharding=whole), of((64,), np.float32, sharding=cut.with_memory_kind("pinned_host"))]
    assert programs.per_device(leaves) == 8 * 6 * 4 / 4 + 5 * 2
    assert programs.shares({"a": leaves[:1], "b": leaves[:2]}) == {"a": 48.0, "b": 10.0}  # the same array counts once


def test_under_adapters_the_reference_is_free(ppo):
    c = ppo[0].copy_and_resolve_references()
    c.stage.adapter.rank, c.stage.rl.value = 2, "head"
    it = programs.iteration(programs.stage(c, "ppo", c.stage, jax.devices()[:2]))
    got = programs.shares(it.resident)
    assert "reference" not in got
    assert got["params"] < 0.5 * got["frozen"] and got["optimizer"] == pytest.approx(2 * got["params"], rel=0.02)


def test_grpo_has_no_critic_and_many_answers(data):
    """Four answers to each prompt; without a penalty there is no reference and nothing of it in the experience."""
    c = shapes_of("ppo", data)
    c.stage = build.stage("grpo", init="x", data=dict(path="none", batch_size=4, max_prompt_len=16), rl=dict(reward="reward", group=4, minibatches=2), sampling=dict(max_new=8))
    c.stage.objective.beta = 0.0
    s = programs.stage(c, "grpo", c.stage, jax.devices()[:2])
    it = programs.iteration(s)
    assert [p.name for p in it.programs] == ["generate", "score", "experience", "step"]
    assert it.programs[0].args[3].tokens.shape == (4, 16) and it.programs[0].kwargs["group"] == 4 and it.tokens == 16 * 8
    assert set(programs.shares(it.resident)) == {"params", "optimizer", "reward", "experience"}
    batch = it.programs[-1].args[2]
    assert batch.ref_logp is None and batch.advantages.shape == batch.tokens.shape == (it.resident["experience"].tokens.shape[0] // 2, batch.tokens.shape[1])
    it.programs[-1].lower(s.world.mesh)  # the step takes these shapes


def test_labels_bring_mismatched_rows_and_a_moving_reference_its_weights(data):
    one = lambda name, **d: build.stage(name, data=dict(path="none", batch_size=8, max_len=16, **d), **({} if name == "tr_dpo" else {"init": "x"}))
    its = {}
    for name in ("kto", "bco", "tr_dpo"):
        c = shapes_of("dpo", data)
        c.stage = one(name)
        s = programs.stage(c, name, c.stage, jax.devices()[:2])
        its[name] = programs.iteration(s)
        its[name].programs[-1].lower(s.world.mesh)
    kto, bco, tr = its["kto"], its["bco"], its["tr_dpo"]
    assert [p.name for p in kto.programs] == ["reference", "step"] and kto.tokens == 2 * bco.tokens == 2 * 8 * 16
    assert [p.name for p in tr.programs] == ["step"]
    held = programs.shares(tr.resident)
    assert held["aux"] == held["params"]


def test_a_plan_adds_up(ppo):
    """Compiled for two simulated devices and a chip that is slow enough to count on."""
    c, s, it = ppo
    p = roofline.plan("ppo", it, s.world.mesh, CHIP)
    assert p.fits and p.chips == 2 and p.held == sum(p.resident.values())
    for q in p.programs:
        assert q.flops > 0 and q.roofline_seconds * (1 + 1e-9) >= max(q.arithmetic_seconds, q.memory_seconds) > 0 and q.seconds >= q.link_seconds > 0
        assert p.peak(q) >= p.held + q.temporaries
    assert p.seconds == pytest.approx(sum(q.times * q.seconds for q in p.programs))
    text = "\n".join(roofline.lines(p, c.stage))
    assert "generate" in text and "fits:" in text and "all-gather" in text
    assert p.json()["programs"][0]["peak"] == p.peak(p.programs[0])
    # The same on a chip with less memory: what takes it, and what would help.
    p.chip = chips.Chip("tiny", ("tiny",), 1e12, 2**10, 1e11, 1e10, 4)
    text = "\n".join(roofline.lines(p, c.stage))
    assert p.fits is False and f"does not fit: {p.worst.name} needs" in text and f"GiB  temporaries of {p.worst.name}" in text and "it would help: a larger mesh.fsdp" in text


def test_flops_are_those_of_the_formula(data):
    """A step without recomputation: what is counted in the program, on two devices, and what `flops_per_token` says."""
    c = build.base("lm", vocab=256, dim=64, layers=3, heads=4, hidden=160)
    c.mesh.data, c.mesh.fsdp = 1, 2
    c.stage = build.stage("lm", data=dict(path="none", batch_size=8, seq_len=64))
    s = programs.stage(c, "lm", c.stage, jax.devices()[:2])
    it = programs.iteration(s)
    q = roofline.compiled(it.programs[0], s.world.mesh, CHIP)
    model = decoder.model(vocab=256, dim=64, layers=3, heads=4, hidden=160)
    # Attention by blocks of 64 computes the whole square here, 6 L N H T beyond what the formula counts.
    square = 6 * 3 * 64 * 64
    assert 2 * q.flops == pytest.approx(8 * 64 * (model.flops_per_token(64) + square), rel=0.1)
    assert it.model_flops == 8 * 64 * model.flops_per_token(64)


# -- the interconnect -----------------------------------------------------------------------------------------------


def torus(*sizes):
    return [types.SimpleNamespace(coords=c) for c in np.ndindex(*sizes)]


def test_wires():
    """10 GB/s a link; an axis of 4 closes. Gathering n bytes over a ring of 4: 3/4 n through two links into each chip."""
    ring, line, square = torus(4, 1, 1), torus(2, 1, 1), torus(4, 4, 1)
    t = lambda kind, devices, group="", size=8e9: roofline.wire_seconds(kind, group, size, devices, CHIP)
    assert t("all-gather", ring) == pytest.approx(0.75 * 8 / 20)
    assert t("all-reduce", ring) == pytest.approx(2 * 0.75 * 8 / 20)
    assert t("all-gather", line) == pytest.approx(0.5 * 8 / 10)  # open: one link
    assert t("all-gather", square) == pytest.approx(15 / 16 * 8 / 40)  # both axes at once
    assert t("all-gather", square, "[4,4]<=[16]") == pytest.approx(0.75 * 8 / 20)  # rows of four
    assert t("all-gather", square, "{{0,4,8,12},{1,5,9,13}}") == pytest.approx(0.75 * 8 / 20)
    assert t("all-gather", square, "[16,1]<=[16]") == 0
    assert t("collective-permute", ring, "{{0,1},{1,2},{2,3},{3,0}}") == pytest.approx(8 / 10)  # 3 to 0 is a neighbour
    assert t("collective-permute", torus(8, 1, 1), "{{0,4}}") == pytest.approx(4 * 8 / 10)


def test_members_of_a_transposed_group():
    """[2,4]<=[4,2]T(1,0): the eight laid out as 4 x 2, read by columns."""
    assert roofline.members("[2,4]<=[4,2]T(1,0)", 8) == [0, 2, 4, 6]
    assert roofline.members("[4,2]<=[8]", 8) == [0, 1]
    assert roofline.members("", 3) == [0, 1, 2]
    # By the names of a mesh's axes, whole or in part: 8 = 4 x 2, of 4 the inner or the outer 2.
    assert roofline.members("mesh['a'=4,'b'=2] {'b'}", 8) == [0, 1]
    assert roofline.members("mesh['a'=4,'b'=2] {'a'}", 8) == [0, 2, 4, 6]
    assert roofline.members("mesh['a'=4,'b'=2] {'a':(2)2}", 8) == [0, 2]
    assert roofline.members("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", 8) == [0, 1, 4, 5]


# -- search ---------------------------------------------------------------------------------------------------------


def tiny_lm(**data):
    c = build.base("lm", vocab=256, dim=64, layers=2, heads=4, kv_heads=2, hidden=160, scan=True)
    c.stage = build.stage("lm", data=dict(path="none", batch_size=8, seq_len=64, **data))
    return c


def test_search_compiles_until_enough_fit_and_ranks_by_what_was_compiled(monkeypatch):
    """Nothing is compiled here: without remat none is let fit, and the later a candidate comes the faster it is said to be,
    whatever the formulas say."""
    c, order = tiny_lm(), []
    w = search.work(c, "lm", jax.devices())

    def pretend(name, asked, mesh, chip, progress):
        order.append(asked)
        q = roofline.Compiled("step", 1, 0.0, temporaries=0 if asked.model.remat != "none" else 2**31, roofline_seconds=1 / len(order))
        return roofline.Plan(name, dict(mesh.shape), mesh.size, chip, [q], {"params": 1.0}, 512, "tokens", 1e6, 0.0)

    monkeypatch.setattr(search, "work", lambda *_: w)
    monkeypatch.setattr(programs, "stage", lambda asked, *_: types.SimpleNamespace(asked=asked, world=types.SimpleNamespace(mesh=shard.make_mesh({}, jax.devices()[:2]))))
    monkeypatch.setattr(programs, "iteration", lambda s: s.asked)
    monkeypatch.setattr(roofline, "plan", pretend)
    found = search.search(c, "lm", jax.devices()[:2], CHIP, top=2)
    assert len(order) == len(found) >= 2
    fitting = [x for x in found if x.plan.fits]
    assert fitting == found[: len(fitting)] and len(fitting) == 2 and all(x.candidate.remat != "none" for x in fitting)
    assert found[0].plan.seconds < found[1].plan.seconds
    best = found[0].candidate
    assert best.data * best.fsdp * best.tensor == 2
    assert f"--config.mesh.fsdp={best.fsdp}" in search.lines(found)[-1]
    assert best.put(c, "lm").stage.data.accumulate == best.accumulate and c.stage.data.accumulate == 0  # the config given is left alone


def dataclass_sizes(x):
    return {"data": x.data, "fsdp": x.fsdp, "tensor": x.tensor}


def test_candidates_divide():
    c = tiny_lm()
    w = search.work(c, "lm", jax.devices())
    all_of_them = search.candidates(c, "lm", 8, w)
    for x in all_of_them:
        assert x.data * x.fsdp * x.tensor == 8 and x.tensor <= 2 and 8 % (x.data * x.fsdp * x.accumulate) == 0
        build.check_stage(shard.make_mesh(dataclass_sizes(x)), "lm", x.put(c, "lm").stage)  # refuses what does not divide
    assert len(set(all_of_them)) == len(all_of_them) > 20


def test_formulas_point_the_right_way():
    """More recomputation takes less memory and more time; more fsdp less memory; accumulation less memory."""
    c = tiny_lm()
    w = search.work(c, "lm", jax.devices())
    at = lambda *x: search.estimate(search.Candidate(*x), w, 8, CHIP, 1e6, 0.0)
    assert at(1, 8, 1, "full", 1)[0] < at(1, 8, 1, "dots", 1)[0] < at(1, 8, 1, "none", 1)[0]
    assert at(1, 8, 1, "full", 1)[0] < at(8, 1, 1, "full", 1)[0]
    assert at(1, 4, 2, "none", 2)[0] < at(1, 4, 2, "none", 1)[0]


# -- what is refused ------------------------------------------------------------------------------------------------


def test_lengths_that_only_data_would_say(data):
    c = runs.config("dpo", data)
    with pytest.raises(UserError, match=r"data.max_len is not set.*--config.stage.data.max_len"):
        programs.stage(c, "dpo", c.stage, jax.devices())


@pytest.mark.parametrize("name, message", [("v5p", "write a TPU slice"), ("h100:8", "write a TPU slice"), ("cpu:x", "write cpu:8"), ("cpu:900", "JAX_NUM_CPU_DEVICES=900")])
def test_topologies_that_are_not(name, message):
    with pytest.raises(UserError, match=message):
        chips.topology(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(UserError, match=r'pip install "jaxalign\[plan\]"'):
        chips.topology("v5e:2x2")


def test_chips_by_the_names_that_jax_gives_them():
    named = {"TPU v5": "TPU v5p", "TPU v5 lite": "TPU v5e", "TPU v6 lite": "TPU v6e", "NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100"}
    assert {k: chips.of(k).name for k in named} == named
    assert chips.of("cpu") is None and chips.peak_flops(jax.devices()) is None


def test_search_wants_a_data_sheet():
    with pytest.raises(UserError, match="data sheet"):
        search.search(tiny_lm(), "lm", jax.devices(), None)
