"""chat and sample as a user runs them: streamed text, stop strings, system prompts, adapters, and what is refused."""

import io
import json
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
import tiny
from jaxalign import build
from jaxalign.cli import chat, speak
from jaxalign.cli import main as cli
from jaxalign.data import detokenize, fast, formats, hub, tokenizers
from jaxalign.data.tokenizers import Bytes
from jaxalign.models import decoder, heads, hf, lora, peft
from jaxalign.rl.rollout import generate
from jaxalign.types import Prompts, UserError

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
WORDS = "the cat says tea and the dog says sea user assistant system"  # what is not ASCII is spelled in bytes


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with runs.devices(1):
        yield


def sentencepiece(directory, specials=()):
    return tokenizers.train_sentencepiece([WORDS] * 3, str(directory / "x.model"), 300, "bpe", specials=specials)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Hugging Face directories: `plain` (no chat template), `hf` (with one), `reward`, and `peft`, an adapter of both."""
    d = tmp_path_factory.mktemp("home")
    t = sentencepiece(d, ["<|im_start|>", "<|im_end|>"])
    model = decoder.model(vocab=t.vocab_size, dim=16, layers=2, heads=4, hidden=24)
    params = tiny.loud(tiny.init(model, seed=3), 2.0)
    hf.save(d / "plain", model, params, tokenizer=t)
    hf.save(d / "hf", model, params, tokenizer=t.carrying(hub.with_template(t.beside, CHATML)))
    head = {"weight": np.ones(16, np.float32), "bias": np.zeros((), np.float32)}
    hf.save(d / "reward", heads.Scalar(model), {"trunk": {k: v for k, v in params.items() if k != "unembed"}, "head": head}, tokenizer=t)
    adapted = lora.attach(params, lora.Lora((("/(q|v)$", 2, 8),)), jax.random.key(1))
    noise = lambda n, x: x + 0.3 * jax.random.normal(jax.random.key(len(n)), x.shape) if n.endswith("/b") else x  # noqa: E731
    from jaxalign import tree

    peft.save(d / "peft", model, tree.map_named(noise, adapted))
    return d


def run(*args) -> None:
    cli.run(["jaxalign", *map(str, args)])


def opened(directory, **over) -> speak.Speaker:
    fv = cli.flags.FlagValues()
    chat.define(fv)
    cli.parse(fv, ["x", f"--run={directory}", *(f"--{k}={x}" for k, v in over.items() for x in (v if isinstance(v, list) else [v]))])
    return speak.opened(fv, "x")


def sampled(capsys, directory, *args) -> dict:
    capsys.readouterr()
    run("sample", f"--run={directory}", "--json", *args)
    return json.loads(capsys.readouterr().out)


# -- text as it becomes certain ---------------------------------------------------------------------------------------


def vocabularies(d):
    sp = sentencepiece(d)
    level = fast._bpe({c: i for i, c in enumerate(fast._letters())} | {"Ġt": 256}, [["Ġ", "t"]], {"<e>": 257}, None)
    about = hub.About(names={"eos_token": "<e>"})
    by_run = fast.of_sentencepiece(sp._proto, sp.specials, False)
    return {"bytes": Bytes(), "sentencepiece": sp, "byte level": fast.Fast(level, about), "byte fallback": fast.Fast(by_run, hub.About(names={"eos_token": "</s>"}))}


def test_pieces_add_up_to_the_text(tmp_path):
    """Texts of all scripts, and ids at random, in which most bytes are no characters at all."""
    r = random.Random(0)
    for name, t in vocabularies(tmp_path).items():
        skip = {t.bos_id, t.eos_id, t.pad_id} - {None}
        for n in range(300):
            if n % 2:
                text = "".join(r.choice([*hub.CORPUS, "\ufffd", "é", "😀", " ", "日本"]) for _ in range(4))
                ids = t.encode(text)
            else:
                ids = [r.randrange(t.vocab_size + 2) for _ in range(r.randrange(40))]
            d, parts = detokenize.Detokenizer(t, skip), []
            for i in ids:
                parts.append(d.push(i))
                if n % 2 and "\ufffd" not in text:
                    assert "\ufffd" not in parts[-1], (name, text)
            assert "".join([*parts, d.finish()]) == t.decode([i for i in ids if i not in skip]), (name, ids)


def test_a_character_appears_when_it_is_whole():
    d = detokenize.Detokenizer(Bytes())
    assert [d.push(b) for b in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    assert [d.push(0xF0), d.push(0x9F), d.finish()] == ["", "", "\ufffd"]


def test_stop_strings_across_pieces():
    """Whatever the pieces: cut before the string that is complete first, and nothing of it was shown."""
    r = random.Random(1)
    for _ in range(500):
        text = "".join(r.choice("ab") for _ in range(12))
        strings = ["".join(r.choice("ab") for _ in range(r.randrange(1, 5))) for _ in range(2)]
        ends = [(text.find(s) + len(s), text.find(s)) for s in strings if s in text]
        want = text[: min(ends)[1]] if ends else text
        stops, out, rest = detokenize.Stops(strings), [], text
        while rest:
            n = r.randrange(1, 4)
            out.append(stops.push(rest[:n]))
            rest = rest[n:]
        assert "".join([*out, stops.finish()]) == want == detokenize.cut_at(text, strings)[0]
        assert (stops.found is not None) == bool(ends)
    stops = detokenize.Stops(["User:"])
    assert [stops.push(p) for p in ("hi U", "se", "ful Us", "er", ": x")] == ["hi ", "", "Useful ", "", ""] and stops.found == "User:"


# -- chat -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory, template, system", [("hf", "", "be brief"), ("hf", "human_assistant", None), ("plain", "", "A talk."), ("plain", "", None)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_turn_is_that_of_a_fresh_run(directory, template, system, temperature, home):
    """The kept cache changes nothing: each answer is what rollout.generate gives on the whole conversation, row = turn."""
    s = opened(home / directory, max_new=9, temperature=temperature, **({"template": template} if template else {}))
    talk, shown = chat.Chat(s, system, seed=5), []
    for k, text in enumerate(("the cat", "says 日本", "tea?")):
        ids = np.array([talk.ids([*talk.turns, ("user", text)])], np.int32)
        out = generate(s.w.model, s.how, s.params, Prompts(ids, np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None], np.array([k], np.int32)), jax.random.key(5))
        want = s.decode(np.asarray(out.tokens)[0][np.asarray(out.mask)[0] > 0])
        shown.clear()
        got = talk.say(text, shown.append)
        assert got.text == "".join(shown) == want.removeprefix(getattr(s.w.template, "lead", "")), k
        assert got.reason == ("length" if np.asarray(out.truncated)[0] else "stop") and got.tokens == np.asarray(out.mask).sum()
    fresh = talk.ids([*talk.turns, ("user", "x")])
    assert talk._stream.read < 3 * len(fresh) and len(talk.turns) == 6


def piped(text, *args):
    command = [sys.executable, "-m", "jaxalign", "chat", "--temperature=0", "--max_new=6", *args]
    out = subprocess.run(command, input=text.encode(), capture_output=True, env=runs.ENV, cwd=runs.ROOT, timeout=300)
    return out.returncode, out.stdout.decode(), out.stderr.decode()


def test_through_a_pipe(home, tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = ["/system be brief", "the cat", "", "/nonsense", f"/save {file}", "/reset", "/system", "the cat", "//the", f"/save {file}", "/quit", "never"]
    code, out, err = piped("\n".join(lines) + "\n", f"--run={home / 'hf'}")
    assert code == 0, err
    first, second = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [m["role"] for m in first] == ["system", "user", "assistant"] and [m["role"] for m in second] == ["user", "assistant"] * 2
    assert second[2]["content"] == "/the"
    said = [m["content"] for m in (*first, *second) if m["role"] == "assistant"]
    assert out == "".join(t if t.endswith("\n") else f"{t}\n" for t in said)
    assert "there is no command '/nonsense'" in err and "the conversation is forgotten" in err
    assert all(t.strip() for t in said)  # or SFT would refuse them
    assert [len(formats.canonical(json.loads(line)).messages) for line in file.read_text().splitlines()] == [3, 4]
    assert piped("\n".join(lines) + "\n", f"--run={home / 'hf'}")[1] == out  # again, the same


def test_a_full_context_says_so(home):
    s = opened(home / "hf", max_new=20, temperature=0)
    free = chat.Chat(s).say("the cat")
    assert free.tokens == 20 and free.reason == "length"
    n = len(chat.Chat(s).ids([("user", "the cat")]))
    talk = chat.Chat(s, max_len=n + 8)
    got = talk.say("the cat")
    assert got.tokens == 8 and got.reason == "context" and free.text.startswith(got.text)
    before = list(talk.turns)
    with pytest.raises(UserError, match=f"context is full.*of {n + 8}; nothing was dropped"):
        talk.say("the cat says tea and the dog says sea " * 3)
    assert talk.turns == before


def test_ctrl_c_stops_the_answer(home):
    s, shown = opened(home / "plain", max_new=40, temperature=0), []
    talk = chat.Chat(s)

    def show(piece):
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    got = talk.say("the", show)
    assert got.reason == "interrupted" and talk.turns[-1] == ("assistant", got.text) and got.text.startswith("".join(shown[:3]))
    assert talk.say("cat").tokens > 0


def test_a_terminal(home, monkeypatch, capsys):
    """Typed lines, Ctrl-C at the prompt, Ctrl-D."""
    typed = iter(["the cat", KeyboardInterrupt, "/help", EOFError])

    def enter(prompt):
        x = next(typed)
        if isinstance(x, str):
            return x
        raise x

    monkeypatch.setattr("builtins.input", enter)
    monkeypatch.setattr(sys, "stdin", type("T", (io.StringIO,), {"isatty": lambda self: True})())
    run("chat", f"--run={home / 'plain'}", "--max_new=4", "--temperature=0")
    got = capsys.readouterr()
    assert got.out.strip() and "has no roles" in got.err and "/save" in got.err and "(Ctrl-D or /quit leaves)" in got.err


# -- sample -----------------------------------------------------------------------------------------------------------


def test_streamed_is_what_a_batch_says(home, capsys):
    for args in (["--temperature=0"], ["--seed=3"], ["--seed=3", "--system=be"], ["--seed=3", f"--adapter={home / 'peft'}"]):
        want = sampled(capsys, home / "hf", "--prompt=the cat", "--max_new=12", *args)
        assert want["reason"] in ("stop", "length") and want["truncated"] == (want["reason"] == "length")
        run("sample", f"--run={home / 'hf'}", "--stream", "--prompt=the cat", "--max_new=12", *args)
        assert capsys.readouterr().out == f"the cat{want['completion']}{' ...' if want['truncated'] else ''}\n\n"


def test_stop_strings_cut_both(home, capsys):
    free = sampled(capsys, home / "plain", "--prompt=the cat", "--max_new=12", "--seed=3")["completion"]
    stop = free[3:6]
    got = sampled(capsys, home / "plain", "--prompt=the cat", "--max_new=12", "--seed=3", "--stop=nowhere", f"--stop={stop}")
    assert got["completion"] == free[: free.find(stop)] and got["reason"] == "string" and not got["truncated"]
    run("sample", f"--run={home / 'plain'}", "--stream", "--prompt=the cat", "--max_new=12", "--seed=3", f"--stop={stop}")
    assert capsys.readouterr().out == f"the cat{got['completion']}\n\n"


def test_generation_config(home, tmp_path):
    """Its stop ids count, its settings are the defaults, flags win; said where it sets something."""
    d = tmp_path / "m"
    d.mkdir()
    for f in (home / "hf").iterdir():
        (d / f.name).write_bytes(f.read_bytes())
    put = lambda **c: (d / "generation_config.json").write_text(json.dumps(c))  # noqa: E731
    put(eos_token_id=[3, 7], do_sample=True, temperature=0.6, top_p=0.9)
    s = opened(d)
    assert (s.how.temperature, s.how.top_p, s.how.top_k) == (0.6, 0.9, 0) and set(s.how.stop) == {3, 5, 7} and "temperature 0.6, top_p 0.9" in s.notes[0]
    s = opened(d, temperature=0, top_p=1)
    assert (s.how.temperature, s.how.top_p) == (0, 1) and not s.notes
    put(eos_token_id=3, temperature=0.6)  # no do_sample: greedy there, and no reason to be cool here
    assert opened(d).how.temperature == 1
    for bad in ({"eos_token_id": 9999}, {"eos_token_id": "x"}, {"do_sample": True, "top_p": 3}):
        put(**bad)
        with pytest.raises(UserError, match="generation_config.json: .*mend it"):
            opened(d)


def test_an_adapter_changes_the_words(home, capsys):
    args = ("--prompt=the cat", "--max_new=12", "--temperature=0")
    plain, adapted = (sampled(capsys, home / "hf", *args, *more) for more in ((), (f"--adapter={home / 'peft'}",)))
    assert plain != adapted


def test_transformers_says_the_same(home, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "plain").eval()
    s = opened(home / "plain", temperature=0, max_new=12)
    talk = chat.Chat(s)
    ids = talk.ids([("user", "the cat")])
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False)[0].tolist()[len(ids) :]
    assert talk.say("the cat").text == s.decode(out)


@pytest.mark.parametrize(
    "verb, args, said",
    [
        ("chat", [], r"--run is missing: jaxalign chat"),
        ("chat", ["--run=nowhere"], r"nowhere holds no config\.json.*or a Hugging Face directory"),
        ("chat", ["--run={}"], r"holds no config\.json"),
        ("chat", ["--run={}/reward"], r"holds a reward model"),
        ("chat", ["--run={}/hf", "--adapter={}/plain"], r"there is no .*adapter_config\.json; name a PEFT directory"),
        ("chat", ["--run={}/plain", "--template=hf"], r"nothing beside the tokenizer holds a chat template"),
        ("chat", ["--run={}/plain", "--template=chatlm"], r"did you mean 'chatml'"),
        ("chat", ["--run={}/plain", "hello"], r"from the terminal or a pipe"),
        ("chat", ["--run={}/plain", "--stop="], r"--stop is empty"),
        ("sample", ["--run={}/plain", "--prompt= "], r"a prompt is empty"),
        ("sample", ["--run={}/plain", "--prompt=a", "--system=b"], r"'plain' can not write messages"),
        ("sample", ["--run={}/plain", "--prompt=a", "--prompt=b", "--stream"], r"--stream shows one prompt"),
        ("convert", ["--run={}/plain", "--adapter", "--to={}/o"], r"holds no adapter/"),
        ("convert", ["--run={}/plain", "--adapter={}/peft", "--to={}/o"], r"say what to convert:\n.*--merge"),
        ("convert", ["--hf={}/plain", "--merge", "--to={}/o"], r"say what to convert"),
        ("convert", ["--hf={}/plain", "--adapter", "--to={}/o"], r"say what to convert"),
    ],
)
def test_refused(verb, args, said, home, capsys):
    import re

    with pytest.raises(SystemExit) as e:
        run(verb, *(a.replace("{}", str(home)) for a in args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("jaxalign: error:") == 1 and re.search(said, err, re.S), err


# -- convert ----------------------------------------------------------------------------------------------------------


def test_adapters_merge_into_either_form(home, tmp_path, capsys):
    args = ("--prompt=the cat", "--max_new=12", "--temperature=0")
    want = sampled(capsys, home / "hf", *args, f"--adapter={home / 'peft'}")
    run("convert", f"--hf={home / 'hf'}", f"--adapter={home / 'peft'}", f"--to={tmp_path / 'run'}")
    run("convert", f"--hf={home / 'hf'}", f"--adapter={home / 'peft'}", "--merge", f"--to={tmp_path / 'merged'}")
    run("convert", f"--hf={home / 'hf'}", f"--to={tmp_path / 'base'}")
    run("convert", f"--run={tmp_path / 'base'}", f"--adapter={home / 'peft'}", "--merge", f"--to={tmp_path / 'again'}")
    for d in ("run", "merged", "again"):
        assert sampled(capsys, tmp_path / d, *args) == want, d
    assert sampled(capsys, tmp_path / "base", *args, f"--adapter={home / 'peft'}") == want
    assert build.trained(str(tmp_path / "run"))[0].template.name == "hf"


def test_a_stages_adapter_leaves_as_it_is(home, tmp_path, capsys):
    run("convert", f"--hf={home / 'hf'}", f"--to={tmp_path / 'run'}")
    (tmp_path / "run/adapter").mkdir()
    for f in (home / "peft").iterdir():
        (tmp_path / "run/adapter" / f.name).write_bytes(f.read_bytes())
    run("convert", f"--run={tmp_path / 'run'}", "--adapter", f"--to={tmp_path / 'out'}")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == {f.name: f.read_bytes() for f in (home / "peft").iterdir()}
    first, second = (sampled(capsys, home / "hf", "--prompt=a", "--temperature=0", "--max_new=9", f"--adapter={a}") for a in (home / "peft", tmp_path / "out"))
    assert first == second


def test_weights_without_a_tokenizer_take_another(home, tmp_path, capsys):
    """With the vocabulary that was left out: the same answer, and its chat template; without it, what to give."""
    for f in ("config.json", "model.safetensors"):
        (tmp_path / f).write_bytes((home / "hf" / f).read_bytes())
    say = lambda *more: (run("sample", "--prompt=tea", "--temperature=0", "--max_new=6", "--json", *more), json.loads(capsys.readouterr().out))[1]  # noqa: E731
    want = say(f"--run={home / 'hf'}")
    assert say(f"--run={tmp_path}", f"--tokenizer={home / 'hf'}") == want
    plain = say(f"--run={tmp_path}", "--tokenizer=bytes", "--template=plain")
    assert plain["completion"] != want["completion"]
    with pytest.raises(UserError, match="holds no tokenizer.model.*give 'bytes'"):
        build.trained(str(tmp_path))


def test_drafts_and_slots_say_the_same(home, capsys):
    """Greedily: a draft changes nothing, whether n-grams or a directory (here the model itself), nor do two slots for three prompts."""

    def said(*more):
        capsys.readouterr()
        run("sample", f"--run={home / 'plain'}", "--prompt=the cat", "--prompt=tea", "--prompt=a", "--temperature=0", "--max_new=6", "--json", *more)
        return capsys.readouterr().out.splitlines()

    want = said()
    assert len(want) == 3
    for more in (["--draft=ngram"], [f"--draft={home / 'plain'}", "--draft_tokens=2"], ["--slots=2"]):
        assert said(*more) == want, more
