"""The command: every config by its own words, and every mistake refused with its place and its remedy."""

import importlib.util
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import runs
from jaxalign.cli import main as cli
from jaxalign.tasks.reviews import World
from jaxalign.types import UserError

CONFIGS = sorted((runs.ROOT / "configs").glob("*.py"))
SMALL = ("dim=16", "layers=1", "heads=2", "hidden=32", "max_len=64")
QUICK = ("--config.stage.train.steps=2", "--config.stage.data.batch_size=4", "--config.stage.optim.warmup=1")


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with runs.devices(1):
        yield


def run(*args) -> None:
    cli.run(["jaxalign", *map(str, args)])


@pytest.fixture
def refused(capsys):
    """refused(*args) -> the one error that the command prints before it exits with 2."""

    def check(*args) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            run(*args)
        text = capsys.readouterr().err
        assert e.value.code == 2, text
        assert text.count("jaxalign: error:") == 1 and "Traceback" not in text
        return text[text.index("jaxalign: error:") :]

    return check


# -- every config, by the command in its docstring ------------------------------------------------------------------


def documented(config: Path) -> list[list[str]]:
    """The commands of a config's docstring, each as a list of words."""
    doc = importlib.util.spec_from_file_location("c", config).loader.get_code("c").co_consts[0]
    return [shlex.split(c) for c in re.findall(r"^    (jaxalign (?:.*\\\n)*.*)$", doc, re.M)]


def presets(config: Path) -> list[str]:
    """What a config offers after the colon: what it tells `build.preset` that it knows."""
    spec = importlib.util.spec_from_file_location(f"config_{config.stem}", config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(UserError) as e:
        module.get_config("no such preset")
    known = str(e.value).partition(" There are ")[2]
    return known.split(", ") if known else []


def test_every_config_says_how_to_run_it():
    for config in CONFIGS:
        commands = documented(config)
        assert commands and {c[1] for c in commands} <= {*cli.VERBS} and {c[1] for c in commands} & {"train", "pipeline", "plan"}, config
        assert all(any(w.split(":")[0] in (f"--config=configs/{config.name}", f"--run=runs/{config.stem}") for w in c) for c in commands), config


@pytest.mark.parametrize("config", [f"{c.name}{a}" for c in CONFIGS for a in ("", *(f":{a}" for a in presets(c)))])
def test_every_config_loads(config, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    from jaxalign.cli import train

    fv = cli.flags.FlagValues()
    train.define(fv)
    cli.parse(fv, ["train", f"--config=configs/{config}"])
    assert fv.config.is_locked and fv.config.name


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Data of every kind, a pretrained model, and that model in Hugging Face form, by the documented commands."""
    d = tmp_path_factory.mktemp("road")
    runs.write_data(d)
    (d / "corpus.txt").write_text("\n\n".join(World(seed=0).texts(150, 0)))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(runs.ROOT)
        follow("pretrain.py", d, "pretrain", {"corpus.txt": d / "corpus.txt"}, *(f"--config.model.{s}" for s in SMALL), "--config.model.vocab=330", "--config.stage.data.seq_len=32")
    run("convert", f"--run={d / 'pretrain'}", f"--to={d / 'hf'}")
    return d


def follow(config: str, d: Path, out: str, files: dict, *more, arg: str = "") -> Path:
    """Runs the documented command of a config with its file names replaced and what makes it small."""
    [command] = documented(runs.ROOT / "configs" / config)
    words = [w.replace(f"configs/{config}", f"configs/{config}{arg}") for w in command[1:]]
    for name, path in {**files, f"runs/{config[:-3]}": d / out}.items():
        assert any(name in w for w in words), (name, words)
        words = [re.sub(rf"={re.escape(name)}$", f"={path}", w) for w in words]
    run(*words, *QUICK, *more)
    return d / out


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "config, arg, file, data, more, metric",
    [
        ("sft.py", "", "train.jsonl", "sft", ("--config.stage.data.seq_len=32", "--config.stage.train.log_every=1"), "nll"),
        ("reward.py", "", "rankings.jsonl", "rankings", ("--config.stage.data.max_len=24",), "accuracy"),
        ("reward.py", ":pairs", "rankings.jsonl", "pairs", ("--config.stage.data.max_len=24",), "accuracy"),
        ("dpo.py", "", "pairs.jsonl", "pairs", ("--config.stage.data.max_len=24",), "rewards/margins"),
        ("dpo.py", ":ipo", "pairs.jsonl", "pairs", ("--config.stage.data.max_len=24",), "rewards/margins"),
        ("kto.py", "", "labelled.jsonl", "labelled", ("--config.stage.data.max_len=24",), "kl"),
        ("rankings.py", "", "rankings.jsonl", "rankings", ("--config.stage.data.max_len=24",), "rewards/margins"),
        ("ppo.py", "", "prompts.jsonl", "prompts", ("--config.stage.sampling.max_new=4",), "objective/kl"),
    ],
)
def test_the_documented_command(config, arg, file, data, more, metric, road, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    model = "DIR" if config == "sft.py" else "HF_DIR"
    files = {model: road / "hf", file: road / f"{data}.jsonl"}
    if config == "ppo.py":
        files["my_package.rewards:score"] = "runs:length_reward"
    out = follow(config, road, f"{config}{arg}".replace(":", "-"), files, *more, arg=arg)
    rows = metrics(out)
    assert [r["step"] for r in rows] == [1, 2] and metric in rows[0]
    assert (out / "params/manifest.json").exists() and (out / "tokenizer").is_dir()
    assert json.loads((out / "config.json").read_text())["section"]["train"]["steps"] == 2


def greedy(capsys, directory: Path) -> list[dict]:
    capsys.readouterr()
    run("sample", f"--run={directory}", "--prompt=soup:", "--prompt=tea:", "--temperature=0", "--max_new=6", "--json")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_pipeline_on_files_of_ones_own(tmp_path):
    """Without a world: figures on held-out files, and no target to hold them against."""
    data = tmp_path / "run" / "data"
    runs.write_data(data)
    text = [json.loads(line)["text"] for line in (data / "text.jsonl").read_text().splitlines()]
    (data / "pretrain.jsonl").write_text(json.dumps({"text": "\n".join(text + World(seed=0).texts(100, 0))}) + "\n")
    for name in ("sft", "pairs"):
        shutil.copy(data / f"{name}.jsonl", data / f"{name}_eval.jsonl")
    shutil.copy(data / "pretrain.jsonl", data / "pretrain_eval.jsonl")
    run("pipeline", f"--config={runs.ROOT}/configs/real.py:smoke", f"--workdir={tmp_path / 'run'}")
    e = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert e["pretrain"]["perplexity"] == pytest.approx(math.exp(e["pretrain"]["nll"])) and 1 < e["sft"]["perplexity"] < 1000
    assert e["reward"]["pairs"] == 40 and 0 <= e["reward"]["accuracy"] <= 1 and "policies" not in e
    assert e["dpo"]["rewards/accuracies"] == pytest.approx(metrics(tmp_path / "run/dpo")[-1]["eval/rewards/accuracies"]) and e["world"] is None
    assert "eval/rewards/accuracies" in metrics(tmp_path / "run/dpo")[-1] and "objective/scores" in metrics(tmp_path / "run/ppo")[0]
    page = (tmp_path / "run/report.html").read_text()
    assert "Held-out figures" in page and "targets" not in page.split("<nav>")[0].split("</style>")[1]


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--config.stages.dpo.optim.lr=-1", r"dpo: .*lr"),
        ("--config.stages.dpo.optim.lr=nan", r"stages\.dpo\.optim\.lr must be finite"),
        ("--config.stages.ppo.rl.minibatches=0", r"ppo: data\.batch_size"),
        ("--config.stages.ppo.rl.kl_estimator=k4", r"ppo: rl\.kl_estimator .k4. is unknown; .*abs, full, k1, k2, k3"),
        ("--config.stages.ppo.sampling.top_p=0", r"ppo: sampling needs .*top_p"),
    ],
)
def test_the_last_stage_is_checked_before_the_first_runs(flag, said, refused, tmp_path):
    text = refused("pipeline", f"--config={runs.ROOT}/configs/quickstart.py:smoke", f"--workdir={tmp_path / 'run'}", flag)
    assert re.search(said, text), text
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "run.lock"]


def test_longer_than_the_positions_of_gpt2(refused, tmp_path):
    """RoPE reads on; a table of positions would silently repeat its last row."""
    runs.write_data(tmp_path)
    c = tmp_path / "c.py"
    c.write_text(f"""
import sys
sys.path.insert(0, {str(runs.ROOT / "tests")!r})
from jaxalign import build
def get_config(arg=None):
    c = build.base("short", family="gpt2", vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=8)
    c.stage = build.stage("lm", data=dict(path="{tmp_path}/text.jsonl", batch_size=4, seq_len=32), train=dict(steps=1))
    return c
""")
    text = refused("train", f"--config={c}", f"--workdir={tmp_path / 'run'}")
    assert re.search(r"text\.jsonl: \d+ tokens, and the model has 8 positions", text), text


def test_a_tokenizer_wants_texts(refused, tmp_path):
    runs.write_data(tmp_path)
    text = refused("train", f"--config={runs.ROOT}/configs/sft.py", f"--workdir={tmp_path / 'run'}", f"--config.stage.data.path={tmp_path}/sft.jsonl", f"--config.tokenizer.train_on={tmp_path}/sft.jsonl", "--config.model.vocab=400")
    assert re.search(r"sft\.jsonl:1: tokenizer\.train_on wants rows with a \"text\"", text), text


def test_an_unknown_model_field(refused, tmp_path):
    (tmp_path / "c.py").write_text("from jaxalign import build\ndef get_config(arg=None):\n    return build.base('x', dims=256)\n")
    for flag in (["--config=" + str(tmp_path / "c.py")], ["--config", str(tmp_path / "c.py")]):
        assert re.search(r"model\.dims is unknown; did you mean 'dim'", refused("train", *flag, f"--workdir={tmp_path / 'run'}"))


def test_sample_and_the_way_to_hugging_face_and_back(road, capsys):
    first = greedy(capsys, road / "pretrain")
    assert [r["prompt"] for r in first] == ["soup:", "tea:"] and all(1 <= r["tokens"] <= 6 for r in first)
    run("convert", f"--hf={road / 'hf'}", f"--to={road / 'back'}")
    assert runs.weights(road / "back/params") == runs.weights(road / "pretrain/params")
    assert greedy(capsys, road / "back") == first


def test_convert_in_bf16_with_more_ids(road, capsys, refused, tmp_path):
    """There and back in the dtype of the file; ids that no tokenizer knows are never said by a model that never saw them."""
    config = json.loads((road / "hf/generation_config.json").read_text())
    assert config["eos_token_id"] == json.loads((road / "hf/config.json").read_text())["eos_token_id"]
    run("convert", f"--hf={road / 'hf'}", f"--to={tmp_path / 'run'}", "--dtype=bfloat16", "--resize_vocab=336")
    assert re.search(r"GB read, .* GB written in .*GB/s\), [\d.]+ GB of host memory at most", capsys.readouterr().out)
    got = greedy(capsys, tmp_path / "run")
    assert [r["prompt"] for r in got] == ["soup:", "tea:"]
    run("convert", f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert (written["vocab_size"], written["dtype"]) == (336, "bfloat16")
    run("convert", f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'small'}", "--resize_vocab=330")
    assert json.loads((tmp_path / "small/config.json").read_text())["vocab_size"] == 330
    for source in (f"--run={tmp_path / 'run'}", f"--hf={road / 'hf'}"):
        assert "cannot shrink the vocabulary to 329: the tokenizer uses 330 ids" in refused("convert", source, f"--to={tmp_path / 'no'}", "--resize_vocab=329")
        assert not (tmp_path / "no").exists()


def test_inspect(road, capsys, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    run("inspect", "--config=configs/sft.py", f"--config.model.path={road / 'hf'}", f"--config.stage.data.path={road / 'sft.jsonl'}", f"--workdir={road / 'i'}", "--config.stage.data.seq_len=32", f"--html={road / 'i.html'}")
    out = capsys.readouterr().out
    assert '"examples": 40' in out and re.search(r"<s>.*\[</s>\]", out) and "mesh: {'data': 1" in out
    page = (road / "i.html").read_text()
    assert re.search(r'class="t x" title="\d+">&lt;/s&gt;</span>', page) and not re.search(r"<script|src=|href=", page)


CHAT = """{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Conversations, a vocabulary with a chat template, and the flags of a run on them."""
    from jaxalign.data import hub, tokenizers

    d = tmp_path_factory.mktemp("talk")
    words = [f"{a} {b}" for a in ("cat", "dog", "sun") for b in ("tea", "sea")]
    rows = [{"messages": [{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": w}]} for w in words]
    (d / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    t = tokenizers.train_sentencepiece([f"say {w} user assistant" for w in words], str(d / "x.model"), 282, "bpe", specials=["<|im_start|>", "<|im_end|>"])
    t.carrying(hub.with_template(t.beside, CHAT)).save(str(d / "tok"))
    return d, [
        f"--config={runs.ROOT / 'configs/sft.py'}", *(f"--config.model.{s}" for s in SMALL), *QUICK, f"--config.stage.data.path={d / 'chat.jsonl'}",
        f"--config.tokenizer.path={d / 'tok'}", "--config.tokenizer.template=hf", "--config.stage.data.seq_len=48",
    ]  # fmt: skip


def test_validate_says_what_there_is(talk, capsys, tmp_path):
    run("validate", *talk[1], f"--workdir={tmp_path / 'run'}")
    out = capsys.readouterr().out
    assert out.endswith("valid\n") and '"trained_stops": 6' in out and "tokens trained" in out and "ends with '<|im_end|>', id 5; a sampler stops at [5, 3]" in out
    assert not (tmp_path / "run").exists()


def test_validate_a_pipeline_that_has_not_run(capsys, tmp_path):
    run("validate", f"--config={runs.ROOT / 'configs/quickstart.py'}:smoke", f"--workdir={tmp_path / 'run'}")
    out = capsys.readouterr().out
    assert '"trained_stops": 2000' in out and "data/rankings.jsonl is not written yet" in out and out.endswith("valid\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "old, new, flags, said",
    [
        ("<|im_start|>assistant\\n' }}{% endif %}", "<|im_start|>assistant\\nWell:' }}{% endif %}", (), r"rendered otherwise alone.*Well:"),
        ("+ m.content +", "+ m.content | upper +", (), "does not write what the assistant says"),
        ("{{ bos_token }}", "{{ messages | length if messages | length > 2 }}", (), r"messages\[1\].*Mend the template"),
        ("{{ bos_token }}", "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", (), "writes more than"),
        ("{{ bos_token }}", "", ("--config.stage.data.seq_len=27", "--config.stage.data.max_drop=1"), r"stop token \(id 5\) is trained in no row"),
        ("{{ bos_token }}", "", ("--config.stage.data.seq_len=5", "--config.stage.data.max_drop=1"), "dropped"),
        ("{{ bos_token }}", "", ("--config.tokenizer.variables=[]",), "tokenizer.variables"),
    ],
)
def test_validate_refuses(old, new, flags, said, talk, refused, tmp_path):
    assert old in CHAT.replace("\n", "\\n")
    (tmp_path / "t.jinja").write_text(CHAT.replace("\n", "\\n").replace(old, new))
    text = refused("validate", *talk[1], f"--workdir={tmp_path / 'run'}", f"--config.tokenizer.template={tmp_path / 't.jinja'}", *flags)
    assert re.search(said, text, re.S), text


def test_a_chat_template_all_the_way(talk, capsys, tmp_path):
    """Train on it, sample with it, export it, import it: the same words, the same template."""
    run("train", *talk[1], f"--workdir={tmp_path / 'run'}", "--config.stage.train.steps=60", "--config.stage.optim.lr=0.02")
    say = lambda where: (capsys.readouterr(), run("sample", f"--run={where}", "--prompt=say dog sea", "--temperature=0", "--max_new=16", "--json"), json.loads(capsys.readouterr().out))[2]  # noqa: E731
    first = say(tmp_path / "run")
    assert first["completion"] in ("dog sea", "dog tea") and not first["truncated"]
    run("convert", f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}")
    run("convert", f"--hf={tmp_path / 'hf'}", f"--to={tmp_path / 'back'}")
    assert json.loads((tmp_path / "back/config.json").read_text())["tokenizer"]["template"] == "hf"
    assert say(tmp_path / "back") == first


def test_a_run_keeps_the_date_of_its_first_day(talk, capsys, tmp_path, monkeypatch):
    """A template that writes the date: resumed, or sampled from, on another day it writes the same one."""
    from jaxalign import build
    from jaxalign.data import jinja

    (tmp_path / "t.jinja").write_text(CHAT.replace("{{ bos_token }}", "{{ bos_token + strftime_now('%d%m%y') }}"))
    flags = [*talk[1], f"--workdir={tmp_path / 'run'}", f"--config.tokenizer.template={tmp_path / 't.jinja'}", '--config.tokenizer.variables={"x": 1}']
    monkeypatch.setattr(jinja, "_today", lambda: "2025-01-31")
    run("train", *flags, "--config.stage.train.save_every=1")
    ended = (tmp_path / "run/metrics.jsonl").read_bytes()
    monkeypatch.setattr(jinja, "_today", lambda: "2025-02-01")
    run("train", *flags, "--config.stage.train.save_every=1")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == ended
    w = build.trained(str(tmp_path / "run"))[0]
    assert w.template.date == "2025-01-31" and json.loads(w.config.tokenizer.variables) == {"x": 1, "strftime_now": "2025-01-31"}


# -- mistakes -------------------------------------------------------------------------------------------------------


def tiny(road: Path, workdir: Path, *more: str, config: str = "sft.py", data="sft.jsonl", verb: str = "train") -> list[str]:
    """A good command; `more` makes it a bad one."""
    small = () if any("model.path" in m for m in more) else [f"--config.model.{s}" for s in SMALL]
    if not any("stage.data.path" in m for m in more):
        more = (f"--config.stage.data.path={road / data}", *more)
    return [verb, f"--config={runs.ROOT / 'configs' / config}", f"--workdir={workdir}", *small, *QUICK, *more]


@pytest.mark.parametrize(
    "row, said",
    [
        ('{"prompt": "a", "completion": }', r"bad\.jsonl:3.*not JSON"),
        ('{"prompt": "a", "completoin": "b"}', r"bad\.jsonl:3: .*"),
        ('{"prompt": "a", "completion": ""}', r"bad\.jsonl:3: .*completion.*empty"),
        ('{"prompt": "a", "completion": 7}', r"bad\.jsonl:3: .*completion"),
        ('["a", "b"]', r"bad\.jsonl:3: .*object"),
        ('{"prompt": "a", "completion": "b", "x": NaN}', r"bad\.jsonl:3.*NaN"),
        ('{"text": "a", "messages": []}', r"bad\.jsonl:3: ambiguous"),
    ],
)
def test_a_bad_row(row, said, road, refused, tmp_path):
    lines = (road / "sft.jsonl").read_text().splitlines()[:8]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:2], row, *lines[2:]]) + "\n")
    text = refused(*tiny(road, tmp_path / "run", f"--config.stage.data.path={tmp_path / 'bad.jsonl'}"))
    assert re.search(said, text), text
    half = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "run.lock"]
    assert not half


def test_prompts_that_fill_the_row_are_counted_and_refused_when_many(road, refused, tmp_path, capsys):
    good = [json.loads(line) for line in (road / "sft.jsonl").read_text().splitlines()]
    write = lambda n: (tmp_path / "long.jsonl").write_text("".join(json.dumps({"prompt": "x" * 40 if i < n else r["prompt"], "completion": r["completion"]}) + "\n" for i, r in enumerate(good)))  # noqa: E731
    args = tiny(road, tmp_path / "run", f"--config.stage.data.path={tmp_path / 'long.jsonl'}", "--config.stage.data.seq_len=32")
    write(21)
    text = refused(*args)
    assert "21 of 40 examples were dropped (21 prompt_too_long)" in text and "max_drop=0.5" in text
    write(5)
    capsys.readouterr()
    run("inspect", *args[1:])
    assert '"dropped": {"prompt_too_long": 5}' in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--config.stage.optim.lrr=1", r"no such field 'lrr'; did you mean 'lr'"),
        ("--config.stgae.optim.lr=1", r"no such field 'stgae'; did you mean 'stage'"),
        ("--config.stage.optim.lr.x=1", r"no such field 'x'"),
        ("--config.stage.train.steps=many", r"steps"),
        ("--config.stage.train.steps=2.5", r"steps"),
        ("--config.stage.optim.lr=NaN", r"optim\.lr must be .*finite.* got nan"),
        ("--config.stage.optim.lr=-1e-3", r"optim\.lr must be .*>= 0, got -0\.001"),
        ("--config.stage.optim.lr=inf", r"optim\.lr must be .*finite.* got inf"),
        ("--config.stage.train.steps=0", r"steps"),
        ("--config.stage.data.batch_size=0", r"batch_size"),
        ("--config.stage.data.accumulate=3", r"batch_size 4 must be a multiple of data\.accumulate 3"),
        ("--config.stage.data.packing=tight", r"tight"),
        ("--config.stage.optim.schedule=cosin", r"schedule 'cosin' is unknown; choose constant, linear or cosine"),
        ("--config.mesh.data=3", r"needs 3 devices, this program has 1; set one axis to -1"),
        ("--config.mesh.fsdp=-1", r"at most one may be -1"),
        ("--config.model.vocab=100", r"tokenizer has \d+ ids but the model only 100"),
        ("--config.model.heads=3", r"dim 16 is not a multiple of model\.heads 3"),
        ("--config.model.dim=0", r"model\.dim must be a positive"),
        ("--config.tokenizer.template=chatlm", r"template 'chatlm' is unknown; did you mean 'chatml'"),
        ("--config.stage.data.path=nowhere.jsonl", r"nowhere\.jsonl"),
        ("--config.stage.init=nowhere", r"'nowhere' is neither a finished stage"),
        ("--config.model.path=nowhere", r"nowhere"),
        ("--stage=dpo", r"no stage 'dpo'"),
        ("--confg=x.py", r"unknown flag --confg; did you mean 'config'"),
    ],
)
def test_a_bad_flag(flag, said, road, refused, tmp_path):
    text = refused(*tiny(road, tmp_path / "run", flag))
    assert re.search(said, text), text
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "run.lock"]


@pytest.mark.parametrize(
    "args, said",
    [
        (["trian"], r"unknown verb 'trian'; did you mean 'train'"),
        (["train"], r"--config is missing"),
        (["train", "--config=nowhere.py", "--workdir=w"], r"--config=nowhere\.py: No such file.*relative to"),
        (["train", f"--config={runs.ROOT}/configs/quickstart.py", "--workdir=w"], r"has the stages pretrain, sft, reward, ppo, dpo: say which"),
        (["train", f"--config={runs.ROOT}/configs/dpo.py:idpo", "--workdir=w"], r"idpo: there is no such preset; did you mean 'ipo'"),
        (["train", f"--config={runs.ROOT}/jaxalign/reproduce/human_preferences.py:fast", "--workdir=w"], r"fast: this config has no presets"),
        (["pipeline", f"--config={runs.ROOT}/configs/sft.py", "--workdir=w"], r"one stage: run it with jaxalign train"),
        (["eval", f"--config={runs.ROOT}/configs/quickstart.py:smoke", "--workdir=w"], r"."),
        (["sample", "--prompt=x"], r"--run is missing"),
        (["sample", "--run=nowhere", "--prompt=x"], r"nowhere holds no config\.json"),
        (["sample", "--run=x", "--temperature=-1"], r"temperature"),
        (["convert", "--run=x"], r"say what to convert"),
        (["convert", "--run=x", f"--to={runs.ROOT}"], r"is not empty"),
    ],
)
def test_a_bad_command(args, said, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refused(*args)
    assert re.search(said, text), text
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_as_a_module():
    """Where scripts are not on the path: `python -m jaxalign`, with the exit codes of the command."""
    said = runs.jaxalign("help")
    assert said.returncode == 0 and said.stdout.startswith("usage: jaxalign VERB")
    said = runs.jaxalign("trian")
    assert said.returncode == 2 and "did you mean 'train'?" in said.stderr


def test_help(capsys):
    for args in ([], ["--help"], *([v, "--help"] for v in cli.VERBS)):
        code = 0
        try:
            run(*args)
        except SystemExit as e:
            code = e.code
        assert code == (0 if args else 2) and "jaxalign" in capsys.readouterr().out


def test_a_reward_model_writes_nothing(road, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    out = road / "reward.py"
    if not out.exists():
        follow("reward.py", road, "reward.py", {"HF_DIR": road / "hf", "rankings.jsonl": road / "rankings.jsonl"}, "--config.stage.data.max_len=24")
    assert "holds a reward model" in refused("sample", f"--run={out}", "--prompt=x")
    assert "no prompt" in refused("sample", f"--run={road / 'pretrain'}")


def nan_reward(prompt, completion, record):
    return float("nan")


def text_reward(prompt, completion, record):
    return "good"


def raising_reward(prompt, completion, record):
    return record["no such key"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("nan_reward", r"nan_reward returned nan for row \d+"),
        ("text_reward", r"text_reward returned 'good' for row \d+"),
        ("raising_reward", r"raising_reward.*KeyError.*no such key"),
        ("lost_reward", r"cannot import 'test_cli:lost_reward'"),
        ("", r"rl\.reward is empty"),
    ],
)
def test_a_bad_reward(name, said, road, refused, tmp_path):
    flags = (f"--config.model.path={road / 'hf'}", f"--config.stage.rl.reward={name and 'test_cli:' + name}", "--config.stage.sampling.max_new=4")
    text = refused(*tiny(road, tmp_path / "run", *flags, config="ppo.py", data="prompts.jsonl"))
    assert re.search(said, text), text
    assert not (tmp_path / "run/params").exists()


def test_preference_without_a_reference(road, refused, tmp_path):
    assert "needs a reference model" in refused(*tiny(road, tmp_path / "run", config="dpo.py", data="pairs.jsonl"))


def test_a_damaged_model_is_not_sampled_from(road, refused, tmp_path):
    shutil.copytree(road / "pretrain", tmp_path / "pretrain")
    path = max((p for p in (tmp_path / "pretrain/params/arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes instead of" in refused("sample", f"--run={tmp_path / 'pretrain'}", "--prompt=x")


