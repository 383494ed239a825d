"""Judges: verdicts read from text, both orders, a server that misbehaves, and a model of ours."""

import http.server
import json
import threading

import jax
import numpy as np
import pytest
from jaxalign import shard
from jaxalign.data.templates import PLAIN, encode_prompt
from jaxalign.data.tokenizers import Bytes
from jaxalign.evals import stats
from jaxalign.models import decoder
from jaxalign.ops import nn
from jaxalign.rl import judge
from jaxalign.rl.experience import token_logps
from jaxalign.rl.judge import Endpoint
from jaxalign.rl.own_judge import Own, judged
from jaxalign.types import Rollout, Tokens, UserError


@pytest.mark.parametrize(
    "text, want",
    [("Rating: 4", 0.75), ("4/5", 0.75), ("on a scale of 1 to 5 I say 2.", 0.25), ("3.5", 0.625), ("5\n", 1), ("1", 0), ("It is 10 of 10, so 5", 1)]
    + [("Rating: 4 stars out of 5", 0.75), ("4 (out of 5)", 0.75), ("**4**/5", 0.75), ("I rate it 4 on a scale of 1 to 5.", 0.75), ("Rating: 4\n\nThis is better than 3 others", 0.75)]
    + [("It makes 2 mistakes.\n\n**4**", 0.75), ("[[2]]: 3 steps miss.", 0.25), ("Clarity 5.\nRating: [[3]]", 0.5), ("4 / 5. It has 3 parts.", 0.75), ("Rating (out of 5): 4", 0.75), ("Rating: 2.5.", 0.375), ("The answer has 2 errors. Score: 3", 0.5), ("<rating>4</rating>", 0.75)],
)
def test_ratings_are_read(text, want):
    assert judge.rating(text) == want


def test_what_is_no_rating_is_refused():
    for text in ("", "good", "10", "0", "77", "-3", "Rating: -3", "8/10", "Rating: 4/10", "[[4]]/10", "3,5", "5.5", "3 of the 4 claims hold", "I can not say, out of 5", "Style 4/5, facts 2/5"):
        with pytest.raises(ValueError, match="no rating"):
            judge.rating(text)


@pytest.mark.parametrize(
    "want, texts",
    [
        (1, ["A", "a", "**A**", "[[A]]", "A) ", "Answer A", "Verdict: A", "Verdict: A\n\nB is too short.", "**Verdict:** A, as B rambles.", "Verdict: A (B rambles)", "The verdict is A.", "B is short.\n\nA.", "My choice is [[A]], B is worse", "I prefer A because B rambles.", "A because it is clearer", "Winner: A", "The better answer is A.", "Verdict - A", "I choose A.", "<verdict>A</verdict>"]),
        (0, ["B", "B. A clear winner.", "Verdict: B. A clear winner.", "Verdict: A\nOn second thought:\nB", "B\n\nA is wrong."]),
        (0.5, ["tie", "TIE", "Tie.", "Verdict: tie", "", "neither", "Verdict: A tie", "Tie. A", "A. Is long.\nB. Is short."]),
        (0.5, ["Answer A is better than answer B.", "I prefer A to B because", "A is longer, but B", "Verdict: A is worse than B", "Response B wins"]),  # prose, which may mean either
    ],
)
def test_verdicts_are_read(want, texts):
    assert {x: judge.verdict(x) for x in texts} == dict.fromkeys(texts, want)


def test_both_orders():
    """Who likes what is longer is heard; who likes the first place always contradicts himself, and that is a tie; one verdict and one
    tie lean one way."""
    a, b = ["long answer", "x", "same"], ["x", "long answer", "same"]
    answers = lambda q: (q.split("[Answer A]\n")[1].split("\n[End")[0], q.split("[Answer B]\n")[1].split("\n[End")[0])  # noqa: E731
    longer = lambda questions: [0.5 + 0.5 * np.sign(len(x) - len(y)) for x, y in map(answers, questions)]  # noqa: E731
    got = judge.compare(longer, ["q"] * 3, a, b)
    np.testing.assert_array_equal(got, [1, 0, 0.5])
    assert stats.win_rate(got, np.full(3, 0.5)) == 0.5
    np.testing.assert_array_equal(judge.compare(lambda q: [1.0] * len(q), ["q"] * 3, a, b), [0.5] * 3)
    hesitant = iter([[1.0, 0.6], [0.5, 0.3]])
    np.testing.assert_array_equal(judge.compare(lambda q: next(hesitant), ["q"] * 2, a[:2], b[:2]), [1, 1])


# -- behind an address ------------------------------------------------------------------------------------------------


class Stub(http.server.BaseHTTPRequestHandler):
    """Plays what `server.script` says, by the question; else rates by the length of the answer."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = asked["messages"][0]["content"]
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), asked["model"], question))
            todo = self.server.script.pop(0) if self.server.script else None
        if todo == "silence":
            self.server.wake.wait(5)
            return
        if todo == "hang up":
            self.connection.close()
            return
        status, body = todo if todo else (200, json.dumps({"choices": [{"message": {"content": f"Rating: {min(5, len(question.split('[Answer]')[-1].split()) - 15)}"}}]}))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    s.lock, s.seen, s.script, s.wake = threading.Lock(), [], [], threading.Event()
    s.daemon_threads = True
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield s
    s.wake.set()
    s.shutdown()
    s.server_close()


def endpoint(server, **more):
    return Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", "stub", **{"pause": 0.01, "timeout": 2.0, **more})


SAYS = lambda text: (200, json.dumps({"choices": [{"message": {"content": text}}]}))  # noqa: E731


def test_an_address_is_asked(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.script = [SAYS("Rating: 4")]
    assert endpoint(server, workers=1).ratings(["q"], ["a"], "Is it short?") == [0.75]
    (path, key, model, question) = server.seen[0]
    assert (path, key, model) == ("/v1/chat/completions", "Bearer secret-key", "stub") and "Is it short?" in question and "[Answer]\na\n" in question
    monkeypatch.delenv("OPENAI_API_KEY")
    server.script = [SAYS("B"), SAYS("A")]
    np.testing.assert_array_equal(judge.compare(endpoint(server, workers=1).prefers, ["q"], ["a"], ["b"]), [0])
    assert server.seen[-1][1] is None


def test_answers_keep_the_order_of_the_questions(server):
    class Echo(Stub):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            threading.Event().wait(0.05 * (5 - int(question)))
            body = json.dumps({"choices": [{"message": {"content": question}}]})
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    server.RequestHandlerClass = Echo
    assert endpoint(server, workers=5)([str(i) for i in range(5)]) == [str(i) for i in range(5)]


def test_what_passes_is_tried_again_and_what_does_not_is_not(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.script = [(503, "busy"), "hang up", (429, "slower"), SAYS("fine")]
    assert endpoint(server)(["q"]) == ["fine"] and len(server.seen) == 4
    server.script = [(401, "who are you")]
    with pytest.raises(ConnectionError, match="after 1 attempts; the last: status 401") as e:
        endpoint(server)(["q"])
    assert "secret-key" not in str(e.value)
    server.script = [(500, "no")] * 9
    with pytest.raises(ConnectionError, match="after 3 attempts"):
        endpoint(server, retries=2)(["q"])
    server.script = ["silence"]
    with pytest.raises(ConnectionError, match="after 1 attempts.*[Tt]ime"):
        endpoint(server, retries=0, timeout=0.2)(["q"])
    server.script = [(200, "<html>")]
    with pytest.raises(ConnectionError, match="no chat completion"):
        endpoint(server)(["q"])


def test_the_reward_of_an_address(server, monkeypatch):
    with pytest.raises(UserError, match="JAXALIGN_JUDGE_ADDRESS"):
        judge.rubric("q", "a", {})
    monkeypatch.setenv("JAXALIGN_JUDGE_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}/v1")
    monkeypatch.setenv("JAXALIGN_JUDGE_MODEL", "stub")
    server.script = [SAYS("Rating: 5")]
    assert judge.rubric("q", "a", {"rubric": "Short?"}) == 1 and "Short?" in server.seen[-1][3]
    for bad in ("ftp://x", "127.0.0.1:80", "http://me:hush@host/v1"):
        with pytest.raises(UserError) as e:
            Endpoint(bad, "m")
        assert "hush" not in str(e.value)


# -- a model of ours --------------------------------------------------------------------------------------------------

MESH = shard.make_mesh({}, jax.devices()[:1])
MODEL = decoder.model(vocab=259, dim=16, layers=1, heads=2, hidden=24)


def own(mesh=MESH):
    params = jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, nn.init(MODEL.specs(), jax.random.key(0)))
    return Own(MODEL, params, Bytes(), PLAIN, mesh)


def test_the_odds_of_a_models_verdicts():
    """One question and option at a time, unpadded: the same probabilities; a rating is their mean, from 0 to 1."""
    o = own()
    questions, options = ["Which is it?"], ("A", "tie")
    got = o.odds(questions, options)
    for q, row in zip(questions, got):
        logp = []
        for option in options:
            ids, said = encode_prompt(q, Bytes(), PLAIN), Bytes().encode(option)
            n = len(ids) + len(said)
            x = Tokens(np.array([ids + said], np.int32), (np.arange(n) >= len(ids)).astype(np.float32)[None], np.ones((1, n), np.int32), np.arange(n, dtype=np.int32)[None])
            logp.append(float(token_logps(MODEL, o.params, x).logp.sum()))
        np.testing.assert_allclose(row, np.exp(logp) / np.exp(logp).sum(), rtol=1e-4)
    np.testing.assert_allclose(got.sum(1), 1)
    rated = o.ratings(["q"], ["a"])
    p = o.odds([judge.rating_prompt("q", "a")], judge.RATINGS)[0]
    np.testing.assert_allclose(rated, [(p @ [1, 2, 3, 4, 5] - 1) / 4], rtol=1e-6)


def test_a_models_ratings_as_a_reward():
    ids = np.array([[*b"ab", *b"xyz", 257, 258], [*b"ab", *b"x", 257, 258, 258, 258]], np.int32)
    mask = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0]], np.float32)
    segments = np.array([[1] * 6 + [0], [1] * 4 + [0] * 3], np.int32)
    rollout = Rollout(ids, mask, segments, segments * np.arange(7, dtype=np.int32), mask, np.arange(2, dtype=np.int32), np.int32(0), np.zeros(2, np.float32))
    scorer = judged(own(), Bytes().decode, MESH, "Short?")
    np.testing.assert_allclose(scorer(rollout, None), own().ratings(["ab", "ab"], ["xyz", "x"], "Short?"), rtol=1e-6)
