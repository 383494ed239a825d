"""The documentation is held to the code: its examples run, its links lead somewhere, its names exist."""

import importlib
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from jaxalign import build, config, methods, types
from jaxalign.cli import main as cli
from jaxalign.data import formats
from jaxalign.models import heads
from jaxalign.objectives import answers, dpo_variants, grpo, ilql, kto, lm, nlpo, odds, offline, ppo, preference, ranked, reward, trpo
from jaxalign.rl import masking
from jaxalign.rl.experience import group_experience, make_experience
from jaxalign.rl.reinforce import remax_experience
from jaxalign.train import optim, state, step
from jaxalign.types import GroupExperience

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text() for p in PAGES if p.name != "performance.md"}  # that one a command writes
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"# (\w+\.py)\n")  # the first line of a block that is a file


def blocks(text: str, kind: str) -> list[str]:
    return [body for k, body in FENCE.findall(text) if k == kind]


def spans(text: str) -> list[str]:
    """What stands in `backticks` outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


FILES = {m[1]: b for b in blocks(TEXTS["docs/extending.md"], "python") if (m := FILE.match(b))}


@pytest.fixture
def example_files(tmp_path, monkeypatch):
    """The files of extending.md, where Python and the command line find them; everything else as from the repository."""
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


PYTHON = [(name, i, b) for name, text in TEXTS.items() for i, b in enumerate(blocks(text, "python"))]


@pytest.mark.parametrize("name, i, body", PYTHON, ids=[f"{n}-{i}" for n, i, _ in PYTHON])
def test_python_blocks_run(name, i, body, example_files):
    if m := FILE.match(body):
        importlib.import_module(Path(m[1]).stem)
    else:
        exec(compile(body, f"{name}, block {i}", "exec"), {"__name__": "example"})


def test_a_loss_by_import_path_trains(example_files):
    """The two blocks of "A new loss" that are files, together: config, import path, evaluation with its empty rows."""
    rows = [{"prompt": f"{i} is", "chosen": " a number.", "rejected": " soup."} for i in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    c = importlib.import_module("my_config").get_config()
    c.stage.train.steps, c.stage.data.eval_path, c.mesh.data = 2, "pairs.jsonl", 8
    s = build.make_stage(build.world(c, "run"), "simpo", c.stage, Path("run"))
    s.go()
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite([last["loss"], last["eval/margin"]]).all()


def test_the_reward_example(example_files):
    assert importlib.import_module("my_rewards").brief("", "one two", {"words": 4}) == -0.2


@pytest.mark.parametrize("name", TEXTS)
def test_links_resolve(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[name])):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        to = (ROOT / name).parent / path if path else ROOT / name
        assert to.exists() or to.name == "performance.md", f"{name}: {target}"
        if anchor:
            titles = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.+)$", to.read_text(), re.M)]
            assert anchor in titles, f"{name}: {target} is none of {titles}"


def test_the_index_of_methods_links_them_all():
    linked = set(re.findall(r"^\| \[\w+\]\((\w+)\.md\) \|", TEXTS["docs/methods/README.md"], re.M))  # with a phrase that says when to choose it
    pages = {p.stem for p in (ROOT / "docs/methods").glob("*.md")} - {"README"}
    assert set(methods.OBJECTIVES) | pages == linked, "a method without a page or a line in the index"


def commands() -> list[tuple[str, str]]:
    """(where, command) of every jaxalign command in the docs, and in the first lines of the configs."""
    out = []
    docstrings = {p.relative_to(ROOT).as_posix(): p.read_text().split('"""')[1] for p in sorted((ROOT / "configs").glob("*.py"))}
    for name, text in {**TEXTS, **docstrings}.items():
        code = "\n".join(blocks(text, "bash")) + "\n" + "\n".join(s for s in spans(text) if s.startswith("jaxalign ")) if name.endswith(".md") else text
        for line in code.replace("\\\n", " ").splitlines():
            if m := re.search(r"(?:^|\s)jaxalign ([a-z]+(?: .*)?)$", line.strip().rstrip(":")):
                out.append((name, m[1]))
    return out


@pytest.mark.parametrize("name, command", commands(), ids=[c for _, c in commands()])
def test_commands_parse(name, command, example_files):
    import shlex

    verb, *argv = shlex.split(command)
    assert verb in cli.VERBS, f"{name}: {verb}"
    fv = flags.FlagValues()
    importlib.import_module(f"jaxalign.cli.{verb}").define(fv)
    cli.parse(fv, [f"jaxalign {verb}", *argv])  # refuses unknown flags and unknown config fields


def config_fields() -> set[str]:
    """model.dim, stage fields such as optim.lr: of all families and built-in stages."""

    def walk(c, at=""):
        for k in c.keys():
            yield at + k
            if isinstance(c.get(k), config.ConfigDict):
                yield from walk(c.get(k), f"{at}{k}.")

    trees = [build.base("x", family=f) for f in config.FAMILIES] + [build.stage(o) for o in methods.OBJECTIVES]
    return {name for c in trees for name in walk(c)}


def resolves(dotted: str) -> bool:
    """Whether jaxalign.a.b.c is a module or something in one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(["jaxalign", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for p in parts[cut:]:
            thing = getattr(thing, p, None)
        return thing is not None
    return False


def test_dotted_names_are_code_or_config():
    rooms = "types|tree|shard|ops|models|objectives|data|tasks|rl|train|evals|report|methods|build"
    sections = "model|tokenizer|mesh|objective|optim|sampling"
    known, wrong = config_fields(), []
    for name, text in TEXTS.items():
        for s in spans(text):
            if m := re.match(rf"((?:jaxalign\.)?(?:{rooms}|{sections})\.[\w.]+)(?:\(.*\))?$", s):
                dotted = m[1].removeprefix("jaxalign.")
                if not (dotted.endswith((".py", ".jsonl", ".html", ".json", ".json.gz", ".model")) or dotted in known or resolves(dotted)):
                    wrong.append(f"{name}: {s}")
            if m := re.search(r"--config\.(?:stages?\.(?:\w+\.)?)?([\w.]+)=", s):
                if not any(k == m[1] or k.endswith("." + m[1]) for k in known):
                    wrong.append(f"{name}: {s}")
    assert not wrong


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:jaxalign|configs|tests|notebooks|docs)/[\w./]+)`", "\n".join(TEXTS.values())))))
def test_paths_exist(path):
    assert (ROOT / path).exists()


def test_every_format_line_is_what_it_says():
    text = TEXTS["docs/data.md"]
    lines = re.findall(r"^\| (.+?) \| `(\{.+?\})` \|", text, re.M)
    assert len(lines) >= 14
    seen = {}
    for title, line in lines:
        example = formats.canonical(json.loads(line))
        seen[title.strip("`")] = type(example).__name__.lower()
    assert {k: seen[k] for k in formats.SCHEMAS} == {k: k for k in formats.SCHEMAS}


def metric_names() -> set[str]:
    """Every metric that training can write, from the shapes of the functions that make them."""
    r = np.random.default_rng(0)
    out = {"num_tokens"}
    tx, schedule = optim.make(optim.Optim(), 1, {})
    episodes = lambda *a: types.Trajectories(*tiny.rows(*a), np.zeros(a[1:], np.float32), np.ones(a[1], np.float32))  # noqa: E731
    extra = {
        "ppo": (ppo.ppo(tiny.LLAMA, entropy_coef=0.1, ptx_coef=0.1), lambda: tiny.init(tiny.LLAMA, value=True), tiny.mixed),
        "grpo": (grpo.grpo(tiny.LLAMA), lambda: {"policy": tiny.init(tiny.LLAMA)}, lambda *a: GroupExperience(*tiny.rows(*a), *[np.zeros(a[1:], np.float32)] * 4)),
        "cispo": (grpo.cispo(tiny.LLAMA), lambda: {"policy": tiny.init(tiny.LLAMA)}, tiny.grouped),
        "vespo": (answers.vespo(tiny.LLAMA), lambda: {"policy": tiny.init(tiny.LLAMA)}, tiny.grouped),
        "experts": (lm.lm(tiny.EXPERTS), lambda: tiny.init(tiny.EXPERTS), tiny.rows),
        "lm": (lm.lm(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA), tiny.rows),
        "dpo": (preference.dpo(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA), tiny.pairs),
        "orpo": (odds.orpo(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA), tiny.pairs),
        "mpo": (dpo_variants.mpo(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA), tiny.pairs),
        "wpo": (dpo_variants.wpo(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA), tiny.pairs),
        "rrhf": (ranked.rrhf(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA), tiny.rankings),
        "kto": (kto.kto(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA), tiny.labelled),
        "ilql": (ilql.ilql(heads.Guided(tiny.LLAMA)), lambda: tiny.init(heads.Guided(tiny.LLAMA)), episodes),
        "mc_returns": (offline.mc_returns(heads.Guided(tiny.LLAMA, 1)), lambda: tiny.init(heads.Guided(tiny.LLAMA, 1)), episodes),
        "advantage_weighted_bc": (offline.advantage_weighted_bc(heads.Guided(tiny.LLAMA, 0)), lambda: tiny.init(heads.Guided(tiny.LLAMA, 0)), episodes),
        "trpo": (trpo.trpo(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA, value=True), tiny.experience),
        "nlpo": (nlpo.nlpo(tiny.LLAMA), lambda: tiny.init(tiny.LLAMA, value=True), tiny.experience),
        "pairs": (reward.pairs(tiny.SCALAR, centre=0.1), lambda: tiny.init(tiny.SCALAR), tiny.pairs),
        "best": (reward.best(tiny.SCALAR), lambda: tiny.init(tiny.SCALAR), tiny.rankings),
        "scores": (reward.scores(tiny.SCALAR), lambda: tiny.init(tiny.SCALAR), lambda *a: types.Labelled(tiny.rows(*a), *[np.zeros(a[1], np.float32)] * 2)),
        "steps": (reward.steps(tiny.SCALAR), lambda: tiny.init(tiny.SCALAR), lambda *a: types.Steps(tiny.rows(*a), np.zeros(a[1:], np.float32))),
    }
    for name, (objective, params, batch) in extra.items():
        fn = step.make_step(objective, tx, schedule=schedule)
        now = jax.eval_shape(lambda p: state.create(p, tx, objective, seed=0), params())
        metrics = jax.eval_shape(fn, now, {}, batch(r, 8, 12))[1]
        out |= set(metrics)
        if name not in ("ppo", "grpo", "cispo", "vespo", "trpo", "nlpo"):
            def held_out_loss(p, b):
                aux = objective.init_aux(p) if objective.init_aux else ()
                stats = {k: step.mean(*v) for k, v in objective.stats(p, {}, aux, b).items()} if objective.stats else {}
                return objective.loss(p, {}, aux, b, jax.random.key(0), stats)

            held_out = jax.eval_shape(held_out_loss, params(), batch(r, 8, 12))
            out |= {f"eval/{k}" for k in [*held_out.metrics, *(f"loss/{t}" for t in held_out.terms)]}
    params = tiny.init(tiny.LLAMA, value=True)
    x = tiny.rows(r, 8, 12)
    rollout = types.Rollout(*x, np.zeros((8, 12), np.float32), np.arange(8, dtype=np.int32), np.int32(0), np.zeros(8, np.float32))
    out |= set(jax.eval_shape(lambda p: make_experience(tiny.LLAMA, None, p, p["policy"], rollout, np.zeros(8, np.float32), 0.1, importance_cap=2.0), params)[1])
    out |= set(jax.eval_shape(lambda p: group_experience(tiny.LLAMA, p, p["policy"], rollout, np.zeros(8, np.float32), group=4, max_new=4), params)[1])
    out |= set(jax.eval_shape(lambda p: group_experience(tiny.LLAMA, p, p["policy"], rollout, np.zeros(8, np.float32), group=4, max_new=4, beta=0.1), params)[1])
    out |= set(jax.eval_shape(lambda p: remax_experience(tiny.LLAMA, p, None, rollout, np.zeros(8, np.float32), group=3), params)[1])
    out |= {"staleness", "objective/score_scale", *(f"dynamic_sampling/{k}" for k in ("rounds", "discarded_groups", "left_over_groups", "missing_groups"))}  # the source's own
    for name, group in (("online_dpo", 2), ("xpo", 1), ("nash_md", 1), ("raft", 4)):
        m = methods.OBJECTIVES[name]
        batch, found = jax.eval_shape(lambda p, m=m, group=group: m.experience(tiny.LLAMA, {"policy": p}, p, rollout, np.zeros(8, np.float32), group=group), tiny.init(tiny.LLAMA))
        objective = m.maker(tiny.LLAMA)
        now = jax.eval_shape(lambda p, o=objective: state.create({"policy": p}, tx, o, seed=0), tiny.init(tiny.LLAMA))
        out |= set(found) | set(jax.eval_shape(step.make_step(objective, tx, schedule=schedule), now, {}, batch)[1])
    masked = masking.actor(tiny.LLAMA, mask_type="learned_top_p", top_mask=0.9, min_tokens_to_keep=1)
    out |= set(jax.eval_shape(lambda p: masking.nlpo_experience(masked, None, {**p, "policy": {"policy": p["policy"], "masking": p["policy"]}}, p["policy"], rollout, np.zeros(8, np.float32), 0.1), params)[1])
    out |= {"on_policy"}  # `rl.given`
    out |= {"eval/gold", "eval/kl", "eval/gold/masked", "eval/kl/masked"}  # `evals.watch`, in a world
    out |= {f"rewards/NAME/{x}" for x in ("mean", "std", "failed")} | {f"environment/{x}" for x in ("turns", "done", "tool_calls")}
    return out


def test_metric_names_exist_and_all_are_explained():
    known = metric_names()
    prefixes = "|".join(sorted({re.escape(k.split("/")[0]) for k in known if "/" in k}))
    explained, wrong = set(), []
    for name, text in TEXTS.items():
        for table in re.findall(r"^\| metric \|.*\n\|[-|]+\|\n((?:\|.*\n?)+)", text, re.M):
            for row in table.splitlines():
                explained |= set(re.findall(r"`([^`]+)`", row.split("|")[1]))
        wrong += [f"{name}: {s}" for s in spans(text) if re.fullmatch(rf"(?:{prefixes})/[\w/]+", s) and s not in known]
    assert not wrong
    assert explained <= known, f"no such metric: {sorted(explained - known)}"
    silent = {k for k in known - explained if not k.startswith("eval/")}
    assert not silent, f"in no table: {sorted(silent)}"
