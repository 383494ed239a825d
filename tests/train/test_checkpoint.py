"""A checkpoint is complete or it does not count."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxalign import tree
from jaxalign.train import checkpoint, disk
from jaxalign.train.checkpoint import Checkpoints, DamagedCheckpoint, load_tree, save_tree, structure
from jaxalign.types import Rollout, UserError

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    aux: dict
    key: jax.Array


def make(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    f = lambda *s, dtype=jnp.float32: jnp.asarray(rng.normal(size=s), dtype)  # noqa: E731
    params = {"embed": f(16, 8), "layers": {"mlp.wi": f(2, 8, 16, dtype=jnp.bfloat16)}, "norm": f(8)}
    aux = {"empty": jnp.zeros((0, 3)), "nothing": {}, "none": None, "flag": jnp.asarray(True), "small": f(4).astype(jnp.float8_e4m3fn)}
    return State(jnp.int32(seed), params, TX.init(params), aux, jax.random.key(seed, impl="rbg"))


def words(x):
    x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (k, x), y in zip(tree.flat(a).items(), tree.flat(b).values()):
        assert x.shape == y.shape and x.dtype == y.dtype and words(x) == words(y), k


def target(x, sharding=None):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding or getattr(a, "sharding", None)), x)


def small(step: int) -> dict:
    return {"w": np.full((4, 3), step, np.float32), "b": np.arange(3) + step}


def fill(directory, steps=(1, 2), keep=2) -> Checkpoints:
    c = Checkpoints(directory, keep)
    for s in steps:
        c.save(s, small(s), {"step": s})
    return c


def snapshot(directory) -> dict:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# -- what is saved comes back ---------------------------------------------------------------------------------------


def test_round_trip_is_bitwise(tmp_path):
    c, arrays = Checkpoints(tmp_path / "c"), {"state": make(3), "source": {}}
    assert c.latest_good() == (None, {}) and c.latest() is None and c.ignored() == {}
    meta = {"offsets": {"metrics.jsonl": 12}, "rng": 2**127, "x": 0.1}
    c.save(3, arrays, meta)
    got, said = c.restore(3, target(arrays))
    assert_same(arrays, got)
    assert said == meta == c.meta(3) and c.steps() == [3] and c.latest_good() == (3, {})
    assert isinstance(got["state"].opt_state[1][0], optax.ScaleByAdamState)
    assert got["state"].params["layers"]["mlp.wi"].dtype == jnp.bfloat16


def test_from_one_mesh_to_another(tmp_path):
    def on(mesh_shape, x):
        mesh = jax.make_mesh(mesh_shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        spec = lambda a: P("data", "model") if a.ndim == 2 and a.size and a.shape[0] % 8 == 0 else P()  # noqa: E731
        return jax.tree.map(lambda a: NamedSharding(mesh, spec(a)), x)

    state = make(1)
    here, there = on((2, 4), state), on((4, 2), state)
    placed = jax.tree.map(jax.device_put, state, here)
    Checkpoints(tmp_path).save(1, placed, {})
    got, _ = Checkpoints(tmp_path).restore(1, jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, there))
    assert_same(state, got)
    for (k, a), s in zip(tree.flat(got).items(), jax.tree.leaves(there)):
        assert a.sharding.is_equivalent_to(s, a.ndim), k
    assert got.params["embed"].addressable_shards[0].data.shape == (4, 4)


def test_the_source_says_its_own_shapes(tmp_path):
    """An experience in flight: whoever resumes does not know how large it was."""
    T = np.zeros((2, 5), np.int32)
    flying = {"rollout": Rollout(*(T + i for i in range(8))), "order": np.arange(7)}
    c = Checkpoints(tmp_path)
    c.save(5, {"state": make(), "source": flying}, {})
    shapes = c.structure(5, "source")
    assert shapes["rollout"]["logp"].shape == (2, 5) and shapes["order"].dtype == np.int64
    got, _ = c.restore(5, {"state": target(make()), "source": shapes})
    assert got["source"]["rollout"]["logp"].tobytes() == (T + 4).tobytes() and isinstance(got["source"]["order"], np.ndarray)
    params, _ = c.restore(5, target(make().params), only="state/params")
    assert_same(params, make().params)
    assert c.structure(5, "nowhere") == {}
    assert c.structure(5)["state"]["key"].dtype == make().key.dtype
    c.save(6, {"state": make(), "source": {}}, {})
    got, _ = c.restore(6, {"state": target(make()), "source": c.structure(6, "source")})
    assert got["source"] == {}


def test_one_stage_hands_its_params_to_the_next(tmp_path):
    c = Checkpoints(tmp_path / "sft/checkpoints")
    for s in (1, 2):
        c.save(s, {"state": make(s)}, {"step": s})
    want = target(make().params)
    for place in ("sft", "sft/checkpoints", "sft/checkpoints/2"):
        params, meta = load_tree(tmp_path / place, want, only="state/params")
        assert_same(params, make(2).params)
        assert meta == {"step": 2}
    save_tree(tmp_path / "out", make(7).params, {"stage": "sft"})
    save_tree(tmp_path / "out", make(8).params)  # replaces
    assert_same(load_tree(tmp_path / "out", want)[0], make(8).params)
    assert structure(tmp_path / "out")["norm"].shape == (8,) and sorted(p.name for p in tmp_path.iterdir()) == ["out", "sft"]
    with pytest.raises(UserError, match="no checkpoint"):
        save_tree(tmp_path / "sft", make().params)
    with pytest.raises(UserError, match="no such directory"):
        load_tree(tmp_path / "typo", want)
    flip(tmp_path / "sft/checkpoints/2/meta.json", 3)
    with pytest.raises(DamagedCheckpoint, match=r"(?s)meta.json.*Step 1 is intact") as e:  # never older weights in silence
        load_tree(tmp_path / "sft", want, only="state/params")
    assert str(tmp_path / "sft/checkpoints/1") in str(e.value)


def test_what_does_not_fit_is_listed(tmp_path):
    c = Checkpoints(tmp_path)
    c.save(1, make(), {})
    wrong = make()
    wrong.params["embed"] = jnp.zeros((16, 9))
    wrong.params["norm"] = jnp.zeros(8, jnp.bfloat16)  # orbax would cast in silence
    wrong.params["deeper"] = jnp.zeros(2)
    del wrong.params["layers"]
    with pytest.raises(UserError) as e:
        c.restore(1, target(wrong.replace(key=jax.random.key(0))))
    lines = str(e.value).splitlines()[1:]
    assert lines == [
        "  not in the checkpoint: params/deeper float32[2]",
        "  only in the checkpoint: params/layers/mlp.wi bfloat16[2, 8, 16]",
        "  params/embed: saved as float32[16, 8], asked for as float32[16, 9]",
        "  params/norm: saved as float32[8], asked for as bfloat16[8]",
        "  key: saved as key<rbg>[], asked for as key<fry>[]",
    ]
    save_tree(tmp_path / "adapter", {"q": {"lora_a": jnp.zeros(2)}})
    with pytest.raises(UserError, match="adapters"):
        load_tree(tmp_path / "adapter", {"q": {"w": jnp.zeros(2), "b": jnp.zeros(2)}})


def test_what_cannot_be_saved_is_named(tmp_path):
    c = Checkpoints(tmp_path / "c")
    with pytest.raises(UserError, match="'a/b' is int"):
        c.save(1, {"a": {"b": 3}}, {})
    with pytest.raises(UserError, match="same name"):
        c.save(1, {"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)}, {})
    with pytest.raises(UserError, match="mount"):
        Checkpoints("gs://bucket/x")
    with pytest.raises(UserError, match="keep = 0"):
        Checkpoints(tmp_path, keep=0)
    assert not (tmp_path / "c").exists()


# -- damage ---------------------------------------------------------------------------------------------------------


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    c = fill(tmp_path / "c")
    good = tmp_path / "good"
    shutil.copytree(c.path(2), good)
    files = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    rng = random.Random(0)
    for name in files + rng.choices(files, k=20):  # every file once, then 20 more anywhere
        bit = rng.randrange(8 * (good / name).stat().st_size)
        flip(c.path(2) / name, bit)
        with pytest.raises(DamagedCheckpoint, match="Step 1 is intact") as e:
            c.restore(2, small(0))
        if name.name != "manifest.json":  # a lie of the manifest's may look like another file's fault
            assert repr(name.as_posix()) in str(e.value)
        step, damaged = c.latest_good()
        assert step == 1 and list(damaged) == [2]
        shutil.copyfile(good / name, c.path(2) / name)
    assert c.latest_good() == (2, {})


def test_truncated_missing_and_extra_files_are_named(tmp_path):
    c = fill(tmp_path / "c")
    good = tmp_path / "good"
    shutil.copytree(c.path(2), good)
    for name in [p.relative_to(good) for p in good.rglob("*") if p.is_file()]:
        path = c.path(2) / name
        for harm in (lambda: path.write_bytes(path.read_bytes()[:-1]), path.unlink):
            harm()
            with pytest.raises(DamagedCheckpoint, match=name.name):
                c.restore(2, small(0))
            assert c.latest_good()[0] == 1
            shutil.copyfile(good / name, path)
    (c.path(2) / "arrays/d/more").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="'arrays/d/more' was not part"):
        c.restore(2, small(0))
    with pytest.raises(DamagedCheckpoint, match="no such checkpoint. Step 1 is intact"):
        c.restore(3, small(0))


def test_a_newer_format_is_refused(tmp_path):
    c = fill(tmp_path, (1,))
    manifest = json.loads((c.path(1) / "manifest.json").read_text())
    (c.path(1) / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(DamagedCheckpoint, match="format 2"):
        c.restore(1, small(0))


def test_if_none_is_intact_nothing_starts_over(tmp_path):
    c = fill(tmp_path)
    flip(c.path(1) / "meta.json", 0)
    (c.path(2) / "manifest.json").unlink()  # not even this makes it "no checkpoint"
    before = snapshot(tmp_path)
    with pytest.raises(DamagedCheckpoint) as e:
        c.latest_good()
    assert "step 2: manifest.json is missing" in str(e.value) and "step 1: 'meta.json' has changed" in str(e.value)
    assert snapshot(tmp_path) == before


def test_leftovers_are_reported_and_only_ours_removed(tmp_path):
    c = fill(tmp_path, (1,))
    for name in ("5", "7.orbax-checkpoint-tmp-3", "4.jaxalign-tmp/arrays", "notes", "6"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "6/x").touch()
    assert c.steps() == [1] and c.latest() == 1
    assert c.latest_good() == (1, {6: "manifest.json is missing"})
    why = c.ignored()
    assert list(why) == ["4.jaxalign-tmp", "5", "6", "7.orbax-checkpoint-tmp-3", "notes"]
    assert "interrupted" in why["4.jaxalign-tmp"] and "empty" in why["5"] and "orbax" in why["7.orbax-checkpoint-tmp-3"]
    shutil.rmtree(tmp_path / "6")
    c.save(5, small(5), {})  # into the place of the empty directory
    assert c.steps() == [1, 5] and list(c.ignored()) == ["7.orbax-checkpoint-tmp-3", "notes"]


def test_a_copy_is_a_checkpoint(tmp_path):
    c = fill(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert Checkpoints(tmp_path / "b").latest_good() == (2, {})
    assert_same(Checkpoints(tmp_path / "b").restore(2, small(0))[0], c.restore(2, small(0))[0])


# -- keeping, going back --------------------------------------------------------------------------------------------


def test_old_ones_go_only_after_the_new_one_is_safe(tmp_path, monkeypatch):
    c = fill(tmp_path, (1, 2))
    seen = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda p, *a, **k: (seen.append((os.path.basename(p), disk.damage(c.path(3)))), rmtree(p, *a, **k)))
    c.save(3, small(3), {})
    assert ("1.old.jaxalign-tmp", None) in seen and c.steps() == [2, 3]


def test_a_pinned_step_is_not_deleted(tmp_path):
    c = fill(tmp_path, (1,), keep=1)
    with c.pin(1) as path:
        c.save(2, small(2), {})
        assert c.steps() == [1, 2] and (path / "meta.json").exists()
    c.save(3, small(3), {})
    assert c.steps() == [3]


def test_saving_a_step_twice_changes_nothing_unless_it_is_damaged(tmp_path):
    c = fill(tmp_path)
    before = snapshot(tmp_path)
    c.save(2, small(9), {"step": 9})
    assert snapshot(tmp_path) == before
    flip(c.path(2) / "tree.json", 9)
    c.save(2, small(9), {"step": 9})
    assert c.meta(2) == {"step": 9} and c.latest_good() == (2, {}) and list(c.ignored()) == ["2.set-aside"]


def test_going_back_sets_the_old_future_aside(tmp_path):
    c = fill(tmp_path, (10, 15, 20), keep=3)
    flip(c.path(20) / "meta.json", 0)
    assert c.latest_good()[0] == 15
    assert c.rewind(10) == [15, 20] and c.steps() == [10] and list(c.ignored()) == ["15.set-aside", "20.set-aside"]
    c.save(15, small(1), {"step": 1})
    assert c.meta(15) == {"step": 1} and c.rewind(10) == [15] and "15.set-aside-2" in c.ignored()
    fill(tmp_path / "b", (10, 20), keep=1)
    with pytest.warns(UserWarning, match=r"\[20\]"):  # without the rewind: 20 must not push out 15
        Checkpoints(tmp_path / "b", keep=1).save(15, small(15), {})
    assert Checkpoints(tmp_path / "b").steps() == [15]


# -- interruption ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` sees it."""


def test_killed_at_every_instant(tmp_path, monkeypatch):
    """Dies before the n-th thing that touches the disk, for every n until the save goes through."""
    places = [(disk, "rename"), (disk, "_sync"), (disk, "_fingerprint"), (shutil, "rmtree"), (checkpoint, "_prepare"), (checkpoint.ocp, "Checkpointer"), (json, "dump")]
    fill(tmp_path / "start", (1, 2))
    count, deaths = [0], 0
    for n in range(200):
        shutil.copytree(tmp_path / "start", tmp_path / str(n))
        c = Checkpoints(tmp_path / str(n))
        with monkeypatch.context() as m:
            count[0] = 0
            for module, name in places:
                def wrapped(*a, real=getattr(module, name), **k):
                    count[0] += 1
                    if count[0] > n:
                        raise Killed
                    return real(*a, **k)
                m.setattr(module, name, wrapped)
            m.setattr(disk, "ThreadPoolExecutor", Inline)
            try:
                c.save(3, small(3), {"step": 3})
                killed = False
            except Killed:
                killed, deaths = True, deaths + 1
        step, damaged = c.latest_good()
        assert step in (2, 3) and not damaged
        assert_same(c.restore(step, small(0))[0], small(step))
        c.save(4, small(4), {})  # and the run goes on
        assert c.latest_good() == (4, {}) and not c.ignored() and len(c.steps()) == 2
        if not killed:
            break
    assert not killed and deaths > 15


class Inline:
    """A pool of no threads, so that the n-th operation is always the same one."""

    def __init__(self, _): ...
    def __enter__(self): return self
    def __exit__(self, *_): ...
    map = staticmethod(map)


CHILD = """
import os, sys
os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_cpu_enable_concurrency_optimized_scheduler=false")
import numpy as np
from jaxalign.train.checkpoint import Checkpoints
c = Checkpoints(sys.argv[1])
step = c.latest_good()[0] or 0
while True:
    step += 1
    c.save(step, {"w": np.full((300, 300), step, np.float32), "b": np.arange(3) + step}, {"step": step})
    print(step, flush=True)
"""


def test_sigkill(tmp_path):
    """A process that does nothing but save is killed at random milliseconds, again and again in the same directory."""
    rng = random.Random(time.time_ns())
    last = 0
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        first = int(child.stdout.readline())
        assert first == last + 1  # it went on from where the last one was, in spite of the litter
        ms = rng.uniform(0, 300)
        time.sleep(ms / 1000)
        child.send_signal(signal.SIGKILL)
        told = [first, *map(int, child.stdout.read().split())]
        child.wait()
        last, damaged = Checkpoints(tmp_path).latest_good()
        print(f"killed after {ms:.1f} ms; reported {told[-1]}, found {last}, litter {list(Checkpoints(tmp_path).ignored())}")
        assert last in (told[-1], told[-1] + 1) and not damaged
        got, meta = Checkpoints(tmp_path).restore(last, {"w": jax.ShapeDtypeStruct((300, 300), np.float32), "b": jax.ShapeDtypeStruct((3,), np.int64)})
        assert (got["w"] == last).all() and meta == {"step": last}


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    c = fill(tmp_path, (1,))
    big = {"w": np.random.default_rng(0).normal(size=100_000)}
    before = snapshot(tmp_path)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # fails in the middle of orbax
        with pytest.raises(UserError, match="Free space"):
            c.save(2, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert snapshot(tmp_path) == before

    with monkeypatch.context() as m:  # known beforehand: nothing is written
        m.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 800_000))
        with pytest.raises(UserError, match="800,000 bytes are free"):
            c.save(2, big, {})
    with monkeypatch.context() as m:  # on the last file

        def dump(*_, **__):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        m.setattr(json, "dump", dump)
        with pytest.raises(UserError, match="quota"):
            c.save(2, big, {})
    assert snapshot(tmp_path) == before and c.latest_good() == (1, {})
    c.save(2, big, {})
    assert c.steps() == [1, 2]


# -- several processes ----------------------------------------------------------------------------------------------

PAIR = """
import os, sys
rank, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_cpu_enable_concurrency_optimized_scheduler=false")
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, cluster_detection_method="deactivate", initialization_timeout=60, shutdown_timeout_seconds=30)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxalign.train.checkpoint import Checkpoints, DamagedCheckpoint
from jaxalign.types import UserError
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
sh = {"w": NamedSharding(mesh, P("a", "b")), "key": NamedSharding(mesh, P())}
like = {"w": jax.ShapeDtypeStruct((4, 8), np.float32, sharding=sh["w"]), "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sh["key"])}
c = Checkpoints(directory + "/c")
assert c.latest_good() == (1, {})                       # saved by one process with 8 devices
one, meta = c.restore(1, like)
assert meta == {"by": 1}
for shard in one["w"].addressable_shards:
    assert (np.asarray(shard.data) == np.arange(32.0).reshape(4, 8)[shard.index]).all()
c.save(2, jax.jit(lambda t: {"w": t["w"] + 1, "key": t["key"]}, out_shardings=sh)(one), {"by": 2})
assert c.steps() == [1, 2] and c.latest_good() == (2, {})
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("saved")
if rank == 0:
    path = c.path(1) / "meta.json"
    path.write_bytes(path.read_bytes()[:-1])
for f in (lambda: c.restore(1, like), lambda: c.meta(1)):
    try:
        f()
        raise AssertionError("the damage went unseen")
    except DamagedCheckpoint as e:                      # on both processes, neither waits for the other
        assert "meta.json" in str(e)
try:
    c.restore(2, {"w": like["w"]})
    raise AssertionError
except UserError as e:
    assert "only in the checkpoint: key" in str(e)
multihost_utils.sync_global_devices("end")
print("fine", flush=True)
jax.distributed.shutdown()
"""


def test_two_processes(tmp_path):
    c = Checkpoints(tmp_path / "c")
    arrays = {"w": jnp.arange(32.0).reshape(4, 8), "key": jax.random.key(5)}
    c.save(1, arrays, {"by": 1})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pair = [
        subprocess.Popen([sys.executable, "-c", PAIR, str(r), port, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(2)
    ]
    try:
        said = [p.communicate(timeout=90)[0] for p in pair]
    finally:
        for p in pair:
            p.kill()
    assert all("fine" in s for s in said), "\n".join(said)
    got, meta = c.restore(2, target(arrays))
    assert_same(got, {"w": arrays["w"] + 1, "key": arrays["key"]})
    assert meta == {"by": 2}
