"""Taking turns: what is trained, what is read, which reward stands where; the same after a kill; and something is learned."""

import json
from pathlib import Path
from types import SimpleNamespace

import environments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from jaxalign import build, shard
from jaxalign.data import formats, jinja
from jaxalign.data.templates import CHATML, HUMAN_ASSISTANT, PLAIN, encode_example
from jaxalign.data.tokenizers import Bytes
from jaxalign.objectives import ppo
from jaxalign.ops import nn
from jaxalign.rl import comparisons, environment, rewards
from jaxalign.rl.environment import Play
from jaxalign.rl.experience import make_experience, token_logps
from jaxalign.rl.online import OnlineSource
from jaxalign.rl.rewards import summary
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.tasks.calculator import Calculator, calc, conversation
from jaxalign.tasks.wordle import Wordle
from jaxalign.train import optim, state, step
from jaxalign.train.log import read_jsonl
from jaxalign.types import Experience, Prompts, UserError

MESH = shard.make_mesh({}, jax.devices()[:1])
PAD, EOS = 0, 1
LETTERS = "..abcdefghijklmn"


class Letters:
    """16 ids: pad, eos, and the letters a to n."""

    vocab_size, bos_id, eos_id, pad_id, specials = 16, None, EOS, PAD, {}

    def encode(self, text, start=False):
        return [LETTERS.index(c) for c in text]

    def encode_batch(self, texts, start=None):
        return [self.encode(t) for t in texts]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids if i > EOS)

    def special_id(self, text):
        return None


HOW = Sampling(4, (EOS, 9), temperature=0.9, pad=PAD)


def play(make=environments.Counting, mesh=MESH, how=HOW, **more):
    return Play(make, tiny.LLAMA, how, Letters(), PLAIN, mesh, **{"turns": 3, "context": 36, **more})


def prompts(n=8, first=0):
    row = np.arange(first, first + n, dtype=np.int32)
    empty = np.zeros((n, 1), np.int32)
    return Prompts(empty, empty, empty, row, tuple({"id": int(i)} for i in row))


def policy(seed=0):
    return {"policy": tiny.init(tiny.LLAMA, seed)}


KEY = jax.random.key(3)


def spans(mask):
    """[begin, end) of every run of ones."""
    edge = np.flatnonzero(np.diff(np.concatenate([[0], mask > 0, [0]])))
    return list(zip(edge[::2], edge[1::2]))


def test_only_the_policys_tokens_are_trained():
    """Each row, token by token: what the environment said is masked out, what is masked in is what `generate` gives for the
    conversation so far, among other neighbours; rewards stand at the last token of their turn; log-probs are those of the training
    forward."""
    made = []
    make = lambda: made.append(environments.Counting()) or made[-1]
    rollout, scored = play(make)(policy(), prompts(), KEY, 7)
    tok, cut_somewhere = Letters(), False
    r = jax.tree.map(np.asarray, rollout)
    again = []  # turn by turn, what the policy says to the conversations as they stand in the rollout, rows in the opposite order
    for turn in range(3):
        before = np.array([[a for a, _ in spans(m)][turn] if len(spans(m)) > turn else 1 for m in r.mask])[:, None]
        real = np.arange(32) < before
        now = Prompts(np.where(real, r.tokens[:, :32], PAD), real.astype(np.int32), np.where(real, np.arange(32), 0).astype(np.int32), r.row)
        now = jax.tree.map(lambda x: x[::-1], now)
        again.append(jax.tree.map(np.asarray, generate(tiny.LLAMA, HOW, policy()["policy"], now, nn.fold(KEY, "turn", turn))))
    for i, game in enumerate(made):
        begin, at = tok.encode("ab"[: 1 + game.seed % 2]), 0
        assert r.tokens[i, : len(begin)].tolist() == begin
        at = len(begin)
        assert len(game.seen) == 1 + i % 3 and len(spans(r.mask[i])) == len(game.seen)
        for turn, (said, (a, b)) in enumerate(zip(game.seen, spans(r.mask[i]))):
            assert a == at, "nothing between an observation and the policy's words is trained or missing"
            n = int(again[turn].mask[-1 - i].sum())
            np.testing.assert_array_equal(r.tokens[i, a:b], again[turn].tokens[-1 - i, a : a + n])
            assert tok.decode([t for t in r.tokens[i, a:b] if t not in HOW.stop]) == said
            assert np.asarray(scored.scores)[i, b - 1] == len(said) - 0.5 * (turn + 1)
            cut = r.tokens[i, b - 1] not in HOW.stop
            cut_somewhere |= cut and turn + 1 < len(game.seen)
            reply = ([EOS] if cut else []) + tok.encode("cd" * (1 + len(said) % 2)) if turn + 1 < len(game.seen) else []
            assert r.tokens[i, b : b + len(reply)].tolist() == reply and not r.mask[i, b : b + len(reply)].any()
            at = b + len(reply)
        assert r.segments[i].sum() == at and (r.tokens[i, at:] == PAD).all()
        assert (np.flatnonzero(np.asarray(scored.scores)[i]) + 1).tolist() == [b for _, b in spans(r.mask[i]) if np.asarray(scored.scores)[i, b - 1]]
    assert cut_somewhere, "a turn that ran out of room was closed"
    train = token_logps(tiny.LLAMA, policy()["policy"], rollout, temperature=0.9).logp
    np.testing.assert_allclose(np.where(r.mask > 0, r.logp, 0), np.where(r.mask > 0, train, 0), atol=1e-4)
    m = {k: float(v) for k, v in summary(scored._replace(scores=None)).items()}
    np.testing.assert_allclose(m["rewards/Counting/mean"], np.asarray(scored.scores).sum(1).mean(), rtol=1e-5)
    assert m["environment/done"] == 1 and m["environment/turns"] == np.mean([1 + i % 3 for i in range(8)]) and int(rollout.version) == 7


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_devices_and_neighbours_do_not_matter():
    whole, scores = play()(policy(), prompts(), KEY, 0)
    p = prompts()
    turned, its = play()(policy(), p._replace(row=p.row[::-1].copy(), records=p.records[::-1]), KEY, 0)
    same(jax.tree.map(lambda x: np.asarray(x)[::-1] if x.ndim else x, whole)._replace(logp=0), turned._replace(logp=0))
    same(np.asarray(scores.scores)[::-1], its.scores)
    mesh = shard.make_mesh({}, jax.devices()[:2])
    with jax.set_mesh(mesh):
        apart, _ = play(mesh=mesh)(jax.device_put(policy(), shard.replicated(mesh)), prompts(), KEY, 0)
    same(apart._replace(logp=0), whole._replace(logp=0))


def test_a_group_meets_the_same_environment():
    seeds = []

    class Seen(environments.Counting):
        def reset(self, record, seed):
            seeds.append(seed)
            return super().reset(record, seed)

    play(Seen, group=4)(policy(), prompts(), KEY, 0)
    assert len(set(seeds[:4])) == 1 and len(set(seeds[4:])) == 1 and seeds[0] != seeds[4]


def test_a_conversation_ends_where_no_turn_fits():
    rollout, scored = play(context=14)(policy(), prompts(), KEY, 0)
    assert rollout.tokens.shape == (8, 14) and 0 < float(scored.environment["done"].mean()) < 1
    with pytest.raises(UserError, match="rl.context 5"):
        play(context=5)(policy(), prompts(), KEY, 0)


def test_environments_that_fail_are_named():
    with pytest.raises(UserError, match="Broken raised KeyError: 'board' in step for row"):
        play(environments.Broken)(policy(), prompts(), KEY, 0)
    with pytest.raises(UserError, match=r"Stuck did not end within 0.2 seconds in step for row"):
        play(environments.Stuck, seconds=0.2)(policy(), prompts(), KEY, 0)


def test_one_process_that_fails_tells_the_others(monkeypatch):
    """Rewards, judges and environments: an error of any kind is told before it is raised, and is raised where it is heard of."""
    heard, decode = [], lambda ids: str(len(ids))
    no = lambda *_: 1 / 0
    x, _ = play()(policy(), prompts(), KEY, 7)
    score = lambda fn, decode=decode: rewards.python(fn, decode, MESH)(x, prompts())
    duel = lambda judge, decode=decode: comparisons.pairwise(judge, decode, MESH, 2)(x, prompts())
    talk = lambda make: play(make)(policy(), prompts(), KEY, 7)
    fair = lambda prompt, *said: 0.5
    monkeypatch.setattr(shard, "agreed", lambda n: heard.append(n) or n)
    for f, *args in ((score, no), (score, fair, no), (duel, no), (duel, fair, no), (talk, environments.Broken), (talk, no)):
        with pytest.raises((UserError, ZeroDivisionError)):
            f(*args)
        assert heard[-1] == (2 if f is score else 1), (f, args)  # 1 of a reward function: it scores tokens
    monkeypatch.setattr(shard, "agreed", lambda n: 2)
    for f, fine in ((score, fair), (duel, fair), (talk, environments.Counting)):
        with pytest.raises(UserError, match="failed in another process"):
            f(fine)


# -- what is said, as templates write it ------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def scripted(monkeypatch, says):
    """The policy says these texts, turn by turn, to every row; `how.stop[0]` ends each."""
    turns = iter(says)

    def fake(model, how, params, p, key, version=0):
        ids = [*Bytes().encode(next(turns)), how.stop[0]]
        B, P = p.tokens.shape
        n = np.asarray(p.segments).sum(1)
        tokens, mask = np.zeros((B, P + how.max_new), np.int32), np.zeros((B, P + how.max_new), np.float32)
        for i in range(B):
            tokens[i, : n[i]] = np.asarray(p.tokens)[i, : n[i]]
            tokens[i, n[i] : n[i] + len(ids)], mask[i, n[i] : n[i] + len(ids)] = ids, 1
        return SimpleNamespace(tokens=tokens, mask=mask, logp=mask * -1, truncated=np.zeros(B))

    monkeypatch.setattr(environment, "generate", fake)


@pytest.mark.parametrize("kind", ["human_assistant", "chatml", "jinja"])
def test_a_played_conversation_is_what_a_demonstration_of_it_trains(kind, monkeypatch):
    """Ids and mask of the calculator's dialogue, with its call, are those of the same messages as SFT data; the whole of the
    policy's words and each stop token, and nothing else, is trained."""
    tok = Bytes()
    template = {"human_assistant": HUMAN_ASSISTANT, "chatml": CHATML}.get(kind) or jinja.template(CHAT, tok, "chat")
    asked = "48*37+12"
    rows = conversation(asked)["messages"]
    if kind == "jinja":  # which knows the role
        rows[2] = {"role": "tool", "content": calc(asked)}
    lead = " " if kind == "human_assistant" else ""
    scripted(monkeypatch, [f"{lead}[calc({asked})]", f"{lead}1788"])
    p = Play(Calculator, None, Sampling(24, (tok.eos_id,), pad=tok.pad_id), tok, template, MESH, turns=3, context=300)
    rollout, scored = p({"policy": None}, prompts(2)._replace(records=({"sum": asked},) * 2), KEY, 0)
    example = formats.Chat(tuple(formats.Message(m["role"], m["content"]) for m in rows))
    ids, mask = encode_example(example, tok, template)
    n = max(np.flatnonzero(mask)) + 1  # what a template writes after the last turn is never read
    ids, mask = ids[:n], mask[:n]
    assert np.asarray(rollout.tokens)[1, :n].tolist() == ids and np.asarray(rollout.segments)[1].sum() == n
    assert np.asarray(rollout.mask)[1, :n].astype(int).tolist() == mask
    assert np.asarray(scored.scores)[1, n - 1] == 1 and np.asarray(scored.scores).sum() == 2
    assert float(scored.environment["tool_calls"][0]) == 1 and float(scored.environment["turns"][0]) == 2


def test_calls_of_tools():
    tools = {"calc": calc, "echo": lambda text, times=1: text * times}
    both = 'I add. <tool_call>\n{"name": "echo", "arguments": {"text": "ab", "times": 2}}\n</tool_call><tool_call>{"name": "calc", "arguments": {"expression": "2*3"}}</tool_call>'
    calls = environment.tool_calls(both, tools)
    assert [environment.call(tools, *c) for c in calls] == ["abab", "6"]
    assert environment.tool_calls("[calc(1+1)] and [no(2)] and [1]", tools) == [("calc", "1+1")]
    said = lambda text: [environment.call(tools, *c) for c in environment.tool_calls(text, tools)]  # noqa: E731
    assert said("<tool_call>{broken}</tool_call>")[0].startswith("error: a call is")
    assert said('<tool_call>{"name": "rm"}</tool_call>') == ["error: there is no tool 'rm'"]
    assert said("[calc(__import__('os'))]")[0].startswith("error: ValueError")
    (d, _) = environment.described(tools)
    assert d["function"]["name"] == "calc" and d["function"]["parameters"]["required"] == ["expression"] and "exactly" in d["function"]["description"]


def test_wordle_is_played(monkeypatch):
    scripted(monkeypatch, [" crane", " zzzzz", " canoe"])
    tok = Bytes()
    p = Play(Wordle, None, Sampling(8, (tok.eos_id,), pad=tok.pad_id), tok, HUMAN_ASSISTANT, MESH, turns=6, context=256)
    rollout, scored = p({"policy": None}, prompts(1)._replace(records=({"word": "canoe"},)), KEY, 0)
    text = tok.decode([int(t) for t, s in zip(np.asarray(rollout.tokens)[0], np.asarray(rollout.segments)[0]) if s])
    assert "gbyyg" in text and "no word" in text
    assert np.asarray(scored.scores)[0][np.flatnonzero(np.asarray(rollout.mask)[0])].sum() == -2 and float(scored.environment["turns"][0]) == 3


# -- training ---------------------------------------------------------------------------------------------------------


def test_ppo_learns_what_an_environment_wants():
    """Uniform over 16 tokens, a turn begins with g one time in sixteen; after forty updates most do."""
    how = Sampling(1, (EOS,), pad=PAD)
    params = {"policy": jax.tree.map(jnp.copy, tiny.init(tiny.LLAMA)), "value": {"weight": jnp.zeros(16), "bias": jnp.zeros(())}}

    class Rows:
        at = 0

        def next(self, _):
            self.at += 1
            return prompts(32, 32 * self.at)

    make = lambda p, ref, rollout, scores, beta: make_experience(tiny.LLAMA, None, p, ref, rollout, scores, beta)
    s = OnlineSource(Rows(), tiny.LLAMA, None, how, MESH, make, reference=tiny.init(tiny.LLAMA), epochs=4, kind=Experience, play=play(environments.Wanted, how=how, turns=2, context=8))
    s.beta = 0.0
    objective = ppo.ppo(tiny.LLAMA)
    tx, schedule = optim.make(optim.Optim(lr=2e-2, warmup=0, schedule="constant"), 40, params)
    now, fn = state.create(params, tx, objective, seed=0), step.make_step(objective, tx, schedule=schedule)
    returns = []
    for _ in range(40):
        now, _ = fn(now, {}, s.next(now))
        if m := s.metrics():
            returns.append(m["rewards/Wanted/mean"])
            assert m["logprob_gap"] < 1e-3 and abs(m["objective/rlhf_reward"] - m["rewards/Wanted/mean"]) < 1e-5
    assert returns[0] < 0.6 and np.mean(returns[-3:]) > 1.5, returns


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with runs.devices(2):
        yield runs.prepared(tmp_path_factory.mktemp("data"))


def config(kind, data):
    c = runs.config(kind, data)
    c.stage.rl.update({"reward": "", "environment": "environments:Counting", "turns": 2, "context": 40})
    if kind == "ppo":
        c.stage.objective.ptx_coef = 0.0
        c.stage.rl.staleness = 1  # so that a conversation under way, with its scores and counts, is in the checkpoint too
    return c


def test_killed_and_resumed(data, tmp_path, monkeypatch):
    """Saves at 3, 6, 7, death at 5, in the middle of the second rollout's minibatches: the same bytes as without."""
    runs.train(config("ppo", data), tmp_path / "whole")
    runs.killed(5, lambda: runs.train(config("ppo", data), tmp_path / "torn"))
    runs.train(config("ppo", data), tmp_path / "torn")
    assert runs.facts(tmp_path / "torn") == runs.facts(tmp_path / "whole")
    first = read_jsonl(tmp_path / "whole/metrics.jsonl")[0]
    assert first["environment/turns"] > 1 and "rewards/Counting/mean" in first


@pytest.mark.parametrize("kind, game, turns", [("grpo", "calculator:Calculator", 1), ("ppo", "wordle:Wordle", 2)])
def test_the_embedded_ones_are_trained_on(kind, game, turns, data, tmp_path):
    """Two updates of a model that knows nothing: every guess is no word and costs 1, no sum is right. Without a critic the reward is
    what the turns were worth together."""
    c = config(kind, data)
    c.stage.rl.update({"environment": f"jaxalign.tasks.{game}", "staleness": 0})
    c.stage.train.steps = 2
    runs.train(c, tmp_path)
    m, later = read_jsonl(tmp_path / "metrics.jsonl")
    name = game.split(":")[1]
    assert m["environment/turns"] == turns and m[f"rewards/{name}/mean"] == {"Wordle": -2.0, "Calculator": 0.0}[name]
    assert m["environment/done"] == (name == "Calculator") and ("environment/tool_calls" in m) == (name == "Calculator")
    assert m.get("reward", 0.0) == 0 and np.isfinite([later["loss"], m["loss"]]).all()
    if kind == "ppo":
        np.testing.assert_allclose([m["objective/scores"], m["objective/rlhf_reward"]], -2, atol=1e-4)


def test_configs_are_refused(data):
    bad = [{"turns": 0}, {"context": 4}, {"reward": "runs:length_reward"}, {"environment": ""}, {"reward_timeout": -1.0}, {"on_reward_error": "no"}]
    for over in bad:
        c = config("grpo", data)
        c.stage.rl.update(over)
        with pytest.raises(UserError):
            build.check(c)
    with pytest.raises(UserError, match="rollout_devices"):
        environment.check("m:E", 2, 64, 8, False, True)
    c = runs.config("grpo", data)
    c.stage.rl.weights = (1.0, 2.0)
    with pytest.raises(UserError, match="rl.weights"):
        runs.train(c, Path(data) / "nowhere")


def test_described_tools_reach_a_chat_template():
    text = "{{ tools | tojson if tools else '' }}" + CHAT
    tok = Bytes()
    ids = environment.Script(tok, jinja.template(text, tok, "chat"), (257,)).opening("2+2=", {"calc": calc})
    said = tok.decode(ids)
    assert json.loads(said.split("user")[0].strip())[0]["function"]["name"] == "calc"
