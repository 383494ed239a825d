"""adapter_config.json of PEFT: what it may say, and which modules it adapts with which rank and alpha.

Names are matched as peft 0.21 matches them, so that both decide alike; but the file may be anybody's, and Python's `re` can
take for ever over a few characters. So no pattern of the file is compiled or matched in this process: a child does it, and
is killed when it overruns.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Iterable

from jaxalign.models import weights
from jaxalign.types import UserError

CONFIG = "adapter_config.json"
SECONDS = 10.0  # for the patterns of one field over all names; an honest one takes microseconds

# Fields that change neither the function nor which tensors there are: bookkeeping, training, how a fresh adapter is drawn.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "peft_type", "task_type", "lora_dropout",
    "megatron_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "fan_in_fan_out", "layers_pattern",
}  # fmt: skip
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules", "modules_to_save", "bias", "init_lora_weights"}
# These draw a and b and leave the base alone; the others (pissa, olora, corda, loftq, lora_ga) take something out of it.
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")


def read(directory) -> dict:
    """adapter_config.json, checked. Raises UserError for anything that would make it another function than the one we load."""
    path = Path(directory) / CONFIG
    c = weights.read_json(Path(directory), CONFIG)
    if c.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {c.get('peft_type')!r} is not supported; jaxalign reads LORA (with rsLoRA and DoRA)")
    if left := sorted(k for k, v in c.items() if k not in HARMLESS | READ and v not in (None, False, "", [], {})):
        raise UserError(f"{path}: {', '.join(f'{k} = {c[k]!r}' for k in left)}: not supported, and ignoring it would load another function")
    if c.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {c['bias']!r} is not supported; only 'none' is, which leaves biases as they are")
    if c.get("init_lora_weights", True) not in PLAIN_INIT:
        raise UserError(f"{path}: init_lora_weights {c['init_lora_weights']!r} changes the base weights; convert it with peft's path_initial_model_for_weight_conversion")
    number = lambda v: type(v) in (int, float) and math.isfinite(v) and v > 0
    ranks, alphas = c.get("rank_pattern") or {}, c.get("alpha_pattern") or {}
    for field, values, good in (
        ("r", [c.get("r")], lambda v: type(v) is int and v > 0),
        ("lora_alpha", [c.get("lora_alpha")], number),
        ("rank_pattern", ranks.values() if isinstance(ranks, dict) else [None], lambda v: type(v) is int and v > 0),
        ("alpha_pattern", alphas.values() if isinstance(alphas, dict) else [None], number),
        ("use_rslora", [c.get("use_rslora", False)], lambda v: type(v) is bool),
        ("use_dora", [c.get("use_dora", False)], lambda v: type(v) is bool),
    ):
        if not all(map(good, values)):
            raise UserError(f"{path}: {field} {c.get(field)!r} is not what it should be (ranks are whole numbers above 0, alphas numbers above 0)")
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        v = c.get(field)
        if not (v is None or isinstance(v, str) or isinstance(v, list) and all(isinstance(x, str) for x in v)):
            raise UserError(f"{path}: {field} {v!r} is neither a regex nor a list of names")
    return c


def adapted(c: dict, path: Path, names: Iterable[str]) -> dict[str, tuple[int, float]]:
    """{module: (rank, alpha)} of those among `names` that the config of the file `path` adapts."""
    names = list(names)
    wanted, left = (_listed(c.get(f), names, f"{path}: {f}") for f in ("target_modules", "exclude_modules"))
    names = [n for n in names if n in wanted and n not in left]
    rank, alpha = (_by_pattern(c.get(f"{k}_pattern") or {}, names, c[default], f"{path}: {k}_pattern") for k, default in (("rank", "r"), ("alpha", "lora_alpha")))
    return {n: (rank[n], alpha[n]) for n in names}


def _listed(given: str | list[str] | None, names: list[str], where: str) -> set[str]:
    """As peft: a string is a regex over the whole name; a list holds names or their last components."""
    if isinstance(given, str):
        return {n for n, first in zip(names, _first([given], names, where)) if first is not None}
    return {n for n in names if any(n == p or n.endswith(f".{p}") for p in given or ())}


def _by_pattern(patterns: dict, names: list[str], default, where: str) -> dict:
    """As peft's rank_pattern and alpha_pattern: the first key that matches the end of the name, as a regex."""
    values = list(patterns.values())
    first = _first([rf"(.*\.)?({k})$" for k in patterns], names, where)
    return {n: default if i is None else values[i] for n, i in zip(names, first)}


# Reads [patterns, names], writes for each name the index of the first pattern that is all of it, or an error's text.
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    found = [re.compile(p) for p in patterns]
    print(json.dumps([next((i for i, p in enumerate(found) if p.fullmatch(n)), None) for n in names]))
except (re.error, RecursionError, OverflowError) as e:
    print(json.dumps(str(e)))
"""


def _first(patterns: list[str], names: list[str], where: str) -> list[int | None]:
    if not patterns or not names:
        return [None] * len(names)
    remedy = "write a list of module names (in rank_pattern and alpha_pattern, names as keys)"
    long = [p for p in patterns if len(p) > 1000]
    if long:
        raise UserError(f"{where}: {long[0][:100]!r}... is a regular expression of more than 1000 characters; {remedy}")
    try:
        # -I, -S: nothing of the environment or of this directory is imported by it.
        child = subprocess.run([sys.executable, "-I", "-S", "-c", _CHILD], input=json.dumps([patterns, names]).encode(), capture_output=True, timeout=SECONDS)
        out = json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        raise UserError(f"{where}: matching {_short(patterns)} takes more than {SECONDS:g} seconds, as repeats inside repeats do; {remedy}") from None
    except ValueError:
        raise UserError(f"{where}: {_short(patterns)} broke the process that matches it (exit {child.returncode}); {remedy}") from None
    if isinstance(out, str):
        raise UserError(f"{where}: {_short(patterns)} is not a regular expression: {out}; {remedy}")
    return out


def _short(patterns: list[str]) -> str:
    return f"{patterns[0][:100]!r}" + (f" and {len(patterns) - 1} more" if len(patterns) > 1 else "")
