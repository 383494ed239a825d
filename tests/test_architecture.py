"""The house keeps its shape: who imports whom, which package enters where, no code from outside, no long files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxalign"
FILES = sorted(PACKAGE.rglob("*.py"))

# design.md section 4. Rooms of one level are blind to one another, unless BESIDE says so.
LEVEL = {"__main__": 4, "types": 0, "tree": 0, "shard": 0, "chips": 0, "ops": 0, "models": 1, "objectives": 1, "data": 1, "tasks": 1, "train": 2, "rl": 2, "evals": 2, "report": 3, "methods": 3, "config": 3, "world": 3, "build_rl": 3, "build": 3, "plan": 3, "cli": 3, "reproduce": 3}
BESIDE = {("evals", "rl")} | {(a, b) for a in ("types", "tree", "shard", "chips", "ops") for b in ("types", "tree", "shard", "ops")} | {(a, "methods") for a in ("config", "world", "build_rl", "build")} | {("world", "config"), ("build_rl", "config"), ("build_rl", "world"), ("build", "build_rl"), ("build", "config"), ("build", "world"), ("cli", "config"), ("cli", "build"), ("cli", "report"), ("plan", "build"), ("plan", "world"), ("cli", "plan"), ("cli", "reproduce"), ("reproduce", "build"), ("reproduce", "cli"), ("reproduce", "report")}
NOT_BESIDE = {("types", "tree"), ("types", "shard"), ("types", "ops"), ("tree", "ops"), ("tree", "shard")}  # within level 0: types first
ONLY = {
    "ml_collections": {"config.py", "world.py", "build_rl.py", "build.py", "plan/programs.py", "plan/search.py", "cli/main.py"},  # the command line for its config_flags
    "orbax": {"train/checkpoint.py"},
    "safetensors": {"models/weights.py"},
}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of all that a file imports, wherever in it: 'jaxalign.ops.nn', 'numpy'."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def upward(source, target):
    """Does this arrow run upward, or across to a neighbour?"""
    if LEVEL[source] == LEVEL[target] and source != target:
        return (source, target) not in BESIDE or (source, target) in NOT_BESIDE
    return LEVEL[target] > LEVEL[source]


def test_no_arrow_runs_upward():
    wrong = []
    for path in FILES:
        if path.name == "__init__.py" and path.parent == PACKAGE:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "jaxalign" and len(parts) > 1 and upward(room(path), parts[1]):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_rule_itself():
    assert upward("ops", "models") and upward("models", "objectives") and upward("train", "rl") and upward("rl", "evals") and upward("types", "tree") and upward("config", "build")
    assert not (upward("rl", "objectives") or upward("evals", "rl") or upward("build", "train") or upward("models", "models") or upward("ops", "shard"))
    assert {room(p) for p in FILES} - {"__init__"} == set(LEVEL), "a room that design.md does not name"


@pytest.mark.parametrize("package", ONLY)
def test_packages_enter_by_one_door(package):
    users = {str(p.relative_to(PACKAGE)) for p in FILES if any(n.split(".")[0] == package for n in imports(p))}
    assert users and users <= ONLY[package]


def test_the_batches_import_neither_jax_nor_flax():
    for path in (PACKAGE / "types.py", *(PACKAGE / "data").glob("*.py"), *(PACKAGE / "tasks").glob("*.py")):
        assert not {n.split(".")[0] for n in imports(path)} & {"jax", "flax", "jaxlib", "optax"}, path


def test_data_and_tasks_run_without_jax():
    """Loader processes must not start a backend: every module of both rooms, imported for real."""
    rooms = [f"jaxalign.{room}.{p.stem}" for room in ("data", "tasks") for p in (PACKAGE / room).glob("*.py") if p.stem != "__init__"] + ["jaxalign.types"]
    code = f"import sys, importlib\nfor m in {rooms}: importlib.import_module(m)\nassert 'jaxalign.data.sources' in sys.modules\nprint([m for m in ('jax', 'flax', 'torch', 'tensorflow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "requests", "urllib.request"}


def test_no_pickle_no_eval_no_remote_code():
    wrong = []
    for path in FILES:
        where = path.relative_to(ROOT)
        wrong += [f"{where} imports {n}" for n in imports(path) if n in FORBIDDEN or n.split(".")[0] in FORBIDDEN]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile"):
                wrong.append(f"{where}:{node.lineno} calls {node.func.id}")
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    wrong.append(f"{where}:{node.value.lineno} passes {node.arg}")
            if isinstance(node, ast.Attribute) and node.attr == "pmap":
                wrong.append(f"{where}:{node.lineno} uses pmap")
    assert not wrong, "\n".join(wrong)


def test_no_long_files_and_no_utils():
    # "About 400 lines": a tenth more is when to look for the concept along which to split.
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 440}
    assert not long, f"split along a concept: {long}"
    assert not [p for p in FILES if re.fullmatch(r"utils?|helpers|common|misc", p.stem)]


def test_the_package_itself_is_lazy():
    assert not [n for n in imports(PACKAGE / "__init__.py") if n.split(".")[0] not in ("__future__", "importlib")]
