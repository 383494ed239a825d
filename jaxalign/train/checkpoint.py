"""Checkpoints that are complete or do not count. The only file that imports orbax.

    DIRECTORY/20/arrays/        orbax: the leaves as nested dicts under their names (`tree.name`)
    DIRECTORY/20/tree.json      {name: [shape, dtype, key implementation or null]}
    DIRECTORY/20/meta.json      whatever the caller wants to find again: data position, log offsets
    DIRECTORY/20/manifest.json  SHA-256 and size of every other file, written last

Everything is written to DIRECTORY/20.jaxalign-tmp, fsync'ed and then renamed, so a directory named by a number is whole
whatever instant the power went. Orbax alone is not enough: a flipped bit in its array files restores without a word, an
empty numbered directory counts as its latest step, and a target of another dtype casts silently. Hence our own manifest
and our own tree.json, both checked before orbax reads a byte.

Everything that saves, restores or looks is called by all processes; process 0 looks and decides, the others follow.
The arrays must be global jax.Arrays, or numpy arrays that are equal on all processes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxalign import tree
from jaxalign.train import disk
from jaxalign.train.disk import MANIFEST, lock as lock
from jaxalign.types import Tree, UserError

META, INDEX, ARRAYS = "meta.json", "tree.json", "arrays"
TEMP, ASIDE = ".jaxalign-tmp", ".set-aside"


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that were written."""


class Checkpoints:
    """The numbered checkpoints of one run. Opening one reads nothing and writes nothing."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        """`keep`: how many of the newest to hold on to. Older ones go after the next save is safe, never before."""
        if keep < 1:
            raise UserError(f"keep = {keep}: at least one checkpoint must be kept")
        self.directory, self.keep = _local(directory), keep

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(self, step: int, arrays: Tree, meta: dict) -> None:
        """Writes a checkpoint and returns when it is safe on disk. A good one of this step is left as it is.

        Newer checkpoints belong to a future that is now written anew: they are set aside (see `rewind`).
        Raises UserError when the disk is full; the checkpoints before are then untouched.
        """
        if newer := self.rewind(step):
            warnings.warn(f"{self.directory}: saving step {step} sets aside the newer checkpoints {newer}", stacklevel=2)
        if _lead(disk.damage, self.path(step)):
            _write(self.path(step), arrays, meta)
        _lead(self._tidy)

    def steps(self) -> list[int]:
        """The steps that look complete, ascending. `latest_good` says whether they are."""
        return _lead(self._steps)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def latest_good(self) -> tuple[int | None, dict[int, str]]:
        """(newest step whose every file verifies, {newer damaged step: what is wrong}); (None, {}) where nothing was ever saved.

        Raises DamagedCheckpoint if there are checkpoints but none verifies: starting over at step 0 is not ours to decide.
        """
        step, damaged = _lead(self._latest_good)
        return step, {int(k): why for k, why in damaged.items()}

    def restore(self, step: int, target: Tree, only: str | None = None) -> tuple[Tree, dict]:
        """(arrays as `target` has them, meta). `target`: leaves with shape, dtype and sharding (jax.ShapeDtypeStruct or arrays);
        a leaf without a sharding becomes a numpy array. Mesh and process count may differ from those that saved.

        `only="state/params"` reads that branch alone; `target` is then the tree of the branch.
        Raises DamagedCheckpoint, naming the file and the previous good step, or UserError, naming every leaf that does not fit.
        """
        with self.pin(step):
            return _load(self.path(step), target, only)

    def structure(self, step: int, only: str | None = None) -> Tree:
        """What was saved, as nested dicts of jax.ShapeDtypeStruct without shardings; {} where the branch `only` has no leaves."""
        return structure(self.path(step), only)

    def meta(self, step: int) -> dict:
        return _lead(_json, self.path(step), META)

    def ignored(self) -> dict[str, str]:
        """{name: why} of everything in the directory that does not count as a checkpoint."""
        return _lead(self._ignored)

    def rewind(self, step: int) -> list[int]:
        """The run goes on from `step`: renames newer checkpoints to N.set-aside, so that none is taken for this run's
        latest. Call it on resuming from an earlier step. Returns the steps set aside; deletes nothing."""
        return _lead(self._rewind, step)

    def pin(self, step: int) -> contextlib.AbstractContextManager[Path]:
        """`with checkpoints.pin(step) as path:` no save, of any process on this machine, deletes the step (for exports, evaluations)."""
        return disk.pin(self.path(step))

    # What process 0 does.

    def _steps(self) -> list[int]:
        return [s for s in self._numbers() if (self.path(s) / MANIFEST).is_file()]

    def _numbers(self) -> list[int]:
        """Every number that holds files, whole or not. An empty directory was never a checkpoint."""
        found = self.directory.iterdir() if self.directory.is_dir() else []
        return sorted(int(p.name) for p in found if re.fullmatch(r"0|[1-9]\d*", p.name) and p.is_dir() and any(p.iterdir()))

    def _latest_good(self) -> tuple[int | None, dict[str, str]]:
        damaged: dict[str, str] = {}
        for step in reversed(self._numbers()):
            why = disk.damage(self.path(step))
            if not why:
                return step, damaged
            damaged[str(step)] = why
        if damaged:
            listing = "".join(f"\n  step {s}: {why}" for s, why in damaged.items())
            raise DamagedCheckpoint(
                f"{self.directory}: there are checkpoints, but none is intact:{listing}\n"
                "Restore them from a copy, or start over in an empty directory; nothing was changed."
            )
        return None, {}

    def _rewind(self, step: int) -> list[int]:
        newer = [s for s in self._numbers() if s > step]
        for s in newer:
            disk.set_aside(self.path(s), ASIDE)
        return newer

    def _tidy(self) -> None:
        for old in self._steps()[: -self.keep]:
            if not disk.pinned(self.path(old)):
                # Renamed first: an interrupted deletion must not leave half a checkpoint under a number.
                doomed = self.directory / f"{old}.old{TEMP}"
                disk.rename(self.path(old), doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        for left in self.directory.glob(f"*{TEMP}"):
            shutil.rmtree(left, ignore_errors=True)

    def _ignored(self) -> dict[str, str]:
        out = {}
        for p in sorted(self.directory.iterdir()) if self.directory.is_dir() else []:
            if p.name.isdigit() and p.is_dir() and (p / MANIFEST).is_file():
                continue
            if p.name.endswith(TEMP):
                out[p.name] = "left by an interrupted save; the next save removes it"
            elif ".orbax-checkpoint-tmp" in p.name:
                out[p.name] = "an unfinished checkpoint of orbax, not ours"
            elif ASIDE in p.name:
                out[p.name] = "set aside when the run went on from an earlier step; delete it if nothing in it is needed"
            elif p.name.isdigit() and p.is_dir():
                out[p.name] = f"no {MANIFEST}: not a whole checkpoint" if any(p.iterdir()) else "an empty directory"
            else:
                out[p.name] = "not a checkpoint"
        return out


# -- single trees: what one stage hands to the next -----------------------------------------------------------------


def save_tree(directory: str | os.PathLike, arrays: Tree, meta: dict | None = None) -> None:
    """Writes one checkpoint at `directory` itself, replacing a checkpoint that is there. Errors as `Checkpoints.save`.

    Raises UserError if `directory` holds something else.
    """
    directory = _local(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise UserError(f"{directory} holds files that are no checkpoint; choose another directory")
    _write(directory, arrays, meta or {}, replace=True)


def load_tree(directory: str | os.PathLike, target: Tree, only: str | None = None) -> tuple[Tree, dict]:
    """(arrays, meta) of a single checkpoint (`save_tree`, or one numbered directory), or of the newest one of a run or
    `checkpoints` directory. Arguments and errors as `Checkpoints.restore`; a damaged newest one is never passed over."""
    return _load(Path(_lead(_locate, _local(directory))), target, only)


def structure(directory: str | os.PathLike, only: str | None = None) -> Tree:
    """What the checkpoint at `directory` (as in `load_tree`) holds, as nested dicts of jax.ShapeDtypeStruct without shardings."""
    path = Path(_lead(_locate, _local(directory)))
    return tree.unflat({k: _struct(*entry) for k, entry in _branch(_lead(_json, path, INDEX), only).items()})


def holds(run: str | os.PathLike, branch: str) -> bool:
    """Whether RUN/params, the weights that a stage left, has the branch; False where there are none."""
    params = _local(run) / "params"
    return (params / MANIFEST).is_file() and bool(structure(params, branch))


def _locate(directory: Path) -> str:
    if (directory / MANIFEST).is_file():
        return str(directory)
    inside = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    if not inside.is_dir():
        raise UserError(f"{directory}: no such directory")
    step, damaged = Checkpoints(inside)._latest_good()
    if step is None:
        raise UserError(f"{directory} holds no checkpoint")
    if damaged:
        listing = "".join(f"\n  step {s}: {why}" for s, why in damaged.items())
        raise DamagedCheckpoint(f"{inside}: the newest checkpoint is damaged:{listing}\nStep {step} is intact: name {inside / str(step)} to use it.")
    return str(inside / str(step))


# -- one directory on disk ------------------------------------------------------------------------------------------


def _write(final: Path, arrays: Tree, meta: dict, replace: bool = False) -> None:
    """Writes `final` as a whole or not at all. What is in its way is set aside, or deleted if `replace`."""
    leaves = tree.flat(arrays)
    if len({k.replace("/", ".") for k in leaves}) != len(jax.tree.leaves(arrays)):
        raise UserError("two leaves of the tree have the same name; dict keys must not contain '/' or '.' in a way that makes them equal")
    index = {k: _entry(k, x) for k, x in leaves.items()}
    texts = {META: json.dumps(meta), INDEX: json.dumps(index, indent=0)}  # before any file exists: this may raise
    temp = final.with_name(final.name + TEMP)
    try:
        _lead(_prepare, temp, texts, _bytes(index))
        data = {k: jax.random.key_data(x) if index[k][2] else x for k, x in leaves.items() if x.size}  # orbax refuses size 0
        if data:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                writer.save(temp / ARRAYS, args=ocp.args.PyTreeSave(tree.unflat(data)))
        _lead(_commit, temp, final, replace)
    except Exception as e:
        if jax.process_index() == 0:
            shutil.rmtree(temp, ignore_errors=True)
        if disk.is_full(e):
            raise UserError(
                f"no room to write checkpoint {final} ({_bytes(index):,} bytes of arrays): {e}\n"
                "Earlier checkpoints are untouched. Free space or raise the quota, lower `keep`, or move the run directory, then resume."
            ) from e
        raise


def _prepare(temp: Path, texts: dict[str, str], size: int) -> None:
    if temp.exists():
        shutil.rmtree(temp)
    temp.mkdir(parents=True)
    free = shutil.disk_usage(temp).free
    if free < size + size // 20 + (1 << 20):  # cheaper to learn now than after writing for ten minutes
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
    for name, text in texts.items():
        (temp / name).write_text(text)


def _commit(temp: Path, final: Path, replace: bool) -> None:
    disk.seal(temp)
    old = disk.set_aside(final, ASIDE) if final.exists() else None
    disk.rename(temp, final)
    if old and (replace or not any(old.iterdir())):
        shutil.rmtree(old)


def _load(path: Path, target: Tree, only: str | None) -> tuple[Tree, dict]:
    found = _lead(_open, path)
    return _read(path, found["index"], target, only), found["meta"]


def _open(path: Path) -> dict:
    """Index and meta, after every file has been verified."""
    why = disk.damage(path)
    if not why:
        return {"index": _json(path, INDEX), "meta": _json(path, META)}
    advice = ""
    if path.name.isdigit():
        earlier = (s for s in reversed(Checkpoints(path.parent)._steps()) if s < int(path.name))
        good = next((s for s in earlier if not disk.damage(path.with_name(str(s)))), None)
        advice = ". No earlier step is intact." if good is None else f". Step {good} is intact: use that one."
    raise DamagedCheckpoint(f"{path}: {why}{advice}")


def _read(path: Path, index: dict, target: Tree, only: str | None) -> Tree:
    """The leaves of `target` from a verified checkpoint."""
    saved, wanted = _branch(index, only), tree.flat(target)
    _check_fit(path, saved, wanted, only)
    prefix = f"{only}/" if only else ""
    item, how, leaves = {}, {}, {}
    for k, x in wanted.items():
        shape, dtype = _physical(saved[k])
        if x.size:
            item[prefix + k] = jax.ShapeDtypeStruct(shape, dtype)
            s = getattr(x, "sharding", None)
            how[prefix + k] = ocp.ArrayRestoreArgs(sharding=s, global_shape=shape, dtype=dtype) if s else ocp.RestoreArgs(restore_type=np.ndarray)
    if item:
        args = ocp.args.PyTreeRestore(tree.unflat(item), restore_args=tree.unflat(how), partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            leaves = tree.flat(reader.restore(path / ARRAYS, args=args))

    def place(k, x):
        (shape, dtype), impl, sharding = _physical(saved[k]), saved[k][2], getattr(x, "sharding", None)
        data = leaves[prefix + k] if x.size else np.zeros(shape, dtype)  # of size 0: there was nothing to save
        if impl:
            return jax.jit(lambda d: jax.random.wrap_key_data(d, impl=impl), out_shardings=sharding)(data)
        return jax.device_put(data, sharding) if sharding and not x.size else data

    return tree.map_named(place, target)


def _check_fit(path: Path, saved: dict, wanted: dict, only: str | None) -> None:
    """Names, shapes and dtypes, all of them in one message."""
    said = {k: f"{dtype}{shape}" for k, (shape, dtype, _) in saved.items()}
    asked = {k: "{1}{0}".format(*_entry(k, x)) for k, x in wanted.items()}
    lines = [f"  not in the checkpoint: {k} {asked[k]}" for k in asked if k not in said]
    lines += [f"  only in the checkpoint: {k} {said[k]}" for k in said if k not in asked]
    lines += [f"  {k}: saved as {said[k]}, asked for as {asked[k]}" for k in asked if k in said and said[k] != asked[k]]
    if lines:
        hint = "\nThe checkpoint holds adapters (LoRA): load them on top of their base model." if any("lora" in k for k in said) and len(said) < len(asked) else ""
        branch = f", branch {only!r}" if only else ""
        raise UserError(
            f"{path}{branch} does not fit the model it is to be loaded into; the config differs from the one that saved it:\n" + "\n".join(lines) + hint
        )


def _json(path: Path, name: str) -> Any:
    try:
        return disk.read_json(path, name)
    except ValueError as e:
        raise DamagedCheckpoint(str(e)) from None


def _local(directory: str | os.PathLike) -> Path:
    if "://" in os.fspath(directory):
        raise UserError(f"{directory}: checkpoints need a mounted file system (rename and fsync); mount the bucket, or copy finished checkpoints to it")
    return Path(directory).absolute()  # orbax refuses relative paths


# -- what is known of a leaf: [shape, dtype, key implementation] ----------------------------------------------------


def _entry(name: str, x: Any) -> list:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise UserError(f"leaf {name!r} is {type(x).__name__}; a checkpoint holds arrays only (JSON values go into meta)")
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        said: list[str] = []  # key_impl wants an array; inside a trace an abstract one will do
        jax.eval_shape(lambda k: said.append(str(jax.random.key_impl(k))), jax.ShapeDtypeStruct(x.shape, x.dtype))
        return [list(x.shape), str(x.dtype), said[0]]
    return [list(x.shape), np.dtype(x.dtype).name, None]


def _struct(shape: list, dtype: str, impl: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype if impl else jnp.dtype(dtype))


def _physical(entry: list) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype on disk: keys are saved as their words."""
    s = _struct(*entry)
    if entry[2]:
        s = jax.eval_shape(jax.random.key_data, s)
    return s.shape, s.dtype


def _bytes(index: dict) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for shape, dtype in map(_physical, index.values()))


def _branch(index: dict, only: str | None) -> dict:
    return {k[len(only) + 1 :]: v for k, v in index.items() if k.startswith(only + "/")} if only else index


# -- several processes ----------------------------------------------------------------------------------------------


def _lead(f: Callable, *args) -> Any:
    """f(*args) of process 0, as JSON, on every process. Also a barrier: nobody goes on before process 0 is done, and if it
    failed nobody waits for it."""
    if jax.process_count() == 1:
        return f(*args)
    said, error = None, None
    if jax.process_index() == 0:
        try:
            said = {"value": f(*args)}
        except Exception as e:
            said, error = {"error": f"{e}", "damaged": isinstance(e, DamagedCheckpoint)}, e
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    said = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(np.resize(text, size))).tobytes())
    if error:
        raise error
    if "error" in said:
        raise (DamagedCheckpoint if said["damaged"] else UserError)(f"process 0: {said['error']}")
    return said["value"]
