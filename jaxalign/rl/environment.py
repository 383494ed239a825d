"""Taking turns: conversations of the policy with environments, many at once, as rollouts that any policy gradient can train on.

An environment says something, the policy answers, and so on, until it is done. Its words are read and never trained: the mask is
1 on the policy's own tokens alone, its stop tokens included, exactly as they were sampled. The reward of a turn stands at the last
token of that turn.

Every turn is one batched `generate` on the conversations so far (the keys of earlier turns are computed again: a cache between
turns would save a share of the reading, not of the writing). Rows that are over wait as a prompt of one token, so that the shapes
of a turn depend on nothing but its longest conversation.
"""

from __future__ import annotations

import inspect
import json
import re
import zlib
from typing import Any, Callable, Protocol

import jax
import numpy as np

from jaxalign import shard
from jaxalign.data.examples import Message
from jaxalign.data.templates import Segment, encode_prompt, encode_sequences
from jaxalign.ops import nn
from jaxalign.rl.engine import generate
from jaxalign.rl.functions import within
from jaxalign.rl.rewards import Scored
from jaxalign.rl.rollout import Sampling
from jaxalign.types import Model, Prompts, Rollout, UserError

SMALLEST = 16  # width of the narrowest turn


class Environment(Protocol):
    """One conversation. A new one is made, without arguments, for each.

    An attribute `tools`, a dict of Python functions by name, offers them: a turn that calls some is answered with what they
    return, for no reward, and `step` does not see it (`tool_calls` says how a call is written)."""

    def reset(self, record: dict, seed: int) -> str:
        """What it says first. `record` is the row of the data; `seed` is the same for all answers of a group, and draws what the
        record leaves open."""

    def step(self, action: str) -> tuple[str, float, bool]:
        """(what it says to the policy's words, the reward of that turn, whether the conversation is over)."""


def check(path: str, turns: int, context: int, max_new: int, rewarded: bool, elsewhere: bool) -> None:
    """Refuses settings of rl that can not be played."""
    if path and (turns < 1 or context < max_new + 2):
        raise UserError(f"rl.turns {turns} must be 1 or more, and rl.context {context} (tokens of a whole conversation) more than sampling.max_new {max_new} of one turn")
    if path and rewarded:
        raise UserError("rl.environment gives its own rewards: leave rl.reward empty, or the environment")
    if path and elsewhere:
        raise UserError("rl.rollout_devices: conversations with an environment are sampled where they are trained on; set it to 0")
    if not path and (turns != 1 or context):
        raise UserError(f"rl.turns {turns} and rl.context {context} are those of an environment; name it in rl.environment")


# -- tools ----------------------------------------------------------------------------------------------------------

_JSON = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_BRACKETS = re.compile(r"\[(\w+)\(([^\[\]]*)\)\]")


def tool_calls(text: str, tools: dict[str, Callable]) -> list[tuple[str, Any]]:
    """(name, arguments) of every call in a turn: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as chat templates teach
    it, or in plain text `[name(text)]` (Toolformer, 2302.04761), whose argument is that one text. What calls no known tool in
    brackets is text."""
    found: list[tuple[str, Any]] = []
    for m in _JSON.finditer(text):
        try:
            call = json.loads(m[1])
            found.append((str(call["name"]), dict(call.get("arguments") or {})))
        except (ValueError, TypeError, KeyError):
            found.append(("", {}))
    return found or [(m[1], m[2]) for m in _BRACKETS.finditer(text) if m[1] in tools]


def call(tools: dict[str, Callable], name: str, arguments: Any) -> str:
    """What a tool says; a call that fails is told so, for the policy to learn from."""
    if name not in tools:
        return f"error: there is no tool {name!r}" if name else 'error: a call is {"name": ..., "arguments": {...}}'
    try:
        return str(tools[name](**arguments) if isinstance(arguments, dict) else tools[name](arguments))
    except Exception as e:
        return f"error: {type(e).__name__}: {e}"


def described(tools: dict[str, Callable]) -> list[dict]:
    """The tools as chat templates want them: name, docstring, parameters as a JSON schema."""
    kinds = {int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
    kinds |= {k.__name__: v for k, v in kinds.items()}  # annotations may be texts
    out = []
    for name, f in tools.items():
        p = inspect.signature(f).parameters.values()
        schema = {"type": "object", "properties": {x.name: {"type": kinds.get(x.annotation, "string")} for x in p}, "required": [x.name for x in p if x.default is x.empty]}
        out.append({"type": "function", "function": {"name": name, "description": inspect.getdoc(f) or "", "parameters": schema}})
    return out


# -- the words of an environment as tokens ----------------------------------------------------------------------------


class Script:
    """How what an environment says is written under a template: as a user's turns, or under one without roles as it stands."""

    def __init__(self, tokenizer, template, stop: tuple[int, ...]):
        self.tokenizer, self.template, self.stop = tokenizer, template, stop

    def opening(self, text: str, tools: dict[str, Callable]) -> list[int]:
        """Ids of the first observation, up to where the policy speaks. Chat templates of models are told of the tools."""
        said: Any = text
        if tools and hasattr(self.template, "render"):
            said = (Message("user", text, more=json.dumps({"tools": described(tools)})),)
        return encode_prompt(said, self.tokenizer, self.template)

    def reply(self, text: str, role: str = "user") -> list[int]:
        """Ids of what follows the policy's stop token, up to where it speaks again."""
        if not self.template.chat:
            return self.tokenizer.encode(text)
        if role == "tool" and not hasattr(self.template, "render"):  # roles of chat templates only
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        segments = self.template.prompt((Message("user", "?"), Message("assistant", "!"), Message(role, text)))
        ends = [i for i, s in enumerate(segments) if s.kind == "stop"]
        if not ends:
            raise UserError("rl.environment: the chat template writes no earlier turn of the assistant as it was said, so a conversation can not go on under it; use another tokenizer.template")
        after: list[Segment] = list(segments[ends[-1] + 1 :])
        return encode_sequences([[Segment("", kind="opened"), *after]], self.tokenizer, add_bos=False)[0][0]

    def said(self, ids) -> str:
        """The policy's words, without its stop token."""
        silent = {*self.stop, self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id}
        return self.tokenizer.decode([int(i) for i in ids if int(i) not in silent])


class _Conversation:
    """One row while it is played."""

    def __init__(self, environment: Environment, ids: list[int]):
        self.environment = environment
        self.tools: dict[str, Callable] = getattr(environment, "tools", {})
        self.ids, self.mask, self.logp, self.reward = list(ids), [0] * len(ids), [0.0] * len(ids), [0.0] * len(ids)
        self.over = self.done = self.truncated = False
        self.turns = self.calls = 0

    def add(self, ids, mask: int, logp=None, reward: float = 0.0) -> None:
        self.ids += [int(i) for i in ids]
        self.mask += [mask] * len(ids)
        self.logp += [0.0] * len(ids) if logp is None else [float(x) for x in logp]
        self.reward += [0.0] * len(ids)
        if reward:
            self.reward[-1] += reward


class Play:
    """`OnlineSource(play=...)`: plays one conversation for each row of the prompts with environments made by `make()`.

    Returns (Rollout [B,context], `Scored` with scores f32[B,context]). A conversation ends when its environment is done, after
    `turns` turns of the policy, or where another turn would not fit into `context` tokens. A turn that ran out of room
    (sampling.max_new) is closed with a stop token that is not trained. `group` consecutive rows get the same seed. Neither slots nor
    restarts matter: turn k of row r draws from fold_in(fold_in(fold(key, "turn", k), r), t).

    seconds: how long an environment may take for a step; one that overruns, or raises, stops the run by the row's name (UserError).
    """

    def __init__(self, make: Callable[[], Environment], model: Model, how: Sampling, tokenizer, template, mesh, *, turns: int, context: int, group: int = 1, seconds: float = 0.0):
        if getattr(model, "start", None) is not None:
            raise UserError("rl.environment: an encoder-decoder reads one text and writes one, and takes no turns; use a decoder-only model")
        if how.draft not in ("", "ngram"):
            raise UserError(f"rl.environment: conversations are sampled without a drafting model; set sampling.draft {how.draft} to '' or ngram")
        self.make, self.model, self.how, self.mesh = make, model, how, mesh
        self.turns, self.context, self.group, self.seconds = turns, context, group, seconds
        self.script = Script(tokenizer, template, how.stop)
        self.name = getattr(make, "__name__", type(make).__name__)

    def __call__(self, params, prompts: Prompts, key, version) -> tuple[Rollout, Scored]:
        salt = np.asarray(jax.random.key_data(key)).tolist()
        rows = self._all(lambda: [self._begin(i, prompts, salt) for i in range(len(prompts.row))])
        for turn in range(self.turns):
            live = [not c.over for c in rows]
            width = shard.agreed(max((len(c.ids) for c, on in zip(rows, live) if on), default=0))
            if not width:
                break
            self._turn(rows, live, width, params["policy"], prompts.row, nn.fold(key, "turn", turn), version)
        return self._rollout(rows, prompts.row, version)

    def _begin(self, i: int, prompts: Prompts, salt: list[int]) -> _Conversation:
        environment, row = self.make(), int(prompts.row[i])
        self.name = type(environment).__name__
        seed = zlib.crc32(f"{salt} {row // self.group}".encode())
        text = self._ask(row, environment.reset, prompts.records[i] if prompts.records else {}, seed)
        ids = self.script.opening(text, getattr(environment, "tools", {}))
        if len(ids) + self.how.max_new > self.context:
            raise UserError(f"environment {self.name}: it opens row {row} with {len(ids)} tokens, and with sampling.max_new {self.how.max_new} that is more than rl.context {self.context}; raise it")
        return _Conversation(environment, ids)

    def _all(self, f: Callable) -> Any:
        """f() on every process: where one's environments fail all stop."""
        said = shard.attempt(f)
        return shard.settled(said, f"environment {self.name}")

    def _ask(self, row: int, f: Callable, *args) -> Any:
        try:
            return within(self.seconds, self.name, f, *args)
        except TimeoutError as e:
            raise UserError(f"environment {self.name} {e} in {f.__name__} for row {row}; mend it, or raise rl.reward_timeout") from None
        except Exception as e:
            raise UserError(f"environment {self.name} raised {type(e).__name__}: {e} in {f.__name__} for row {row}") from e

    def _turn(self, rows: list[_Conversation], live: list[bool], width: int, policy, row, key, version) -> None:
        P = min(max(SMALLEST, 1 << (width - 1).bit_length()), self.context - self.how.max_new)
        tokens, segments = np.full((len(rows), P), self.how.pad, np.int32), np.zeros((len(rows), P), np.int32)
        for i, c in enumerate(rows):
            n = len(c.ids) if live[i] else 1
            tokens[i, :n], segments[i, :n] = c.ids[:n], 1
        prompts = Prompts(tokens, segments, np.where(segments > 0, np.arange(P, dtype=np.int32), 0), row)
        out = generate(self.model, self.how, policy, shard.place(prompts, self.mesh), key, version)
        tokens, mask, logp, cut = (shard.to_local(x) for x in (out.tokens, out.mask, out.logp, out.truncated))
        heard = [(c, int(row[i]), tokens[i][mask[i] > 0], logp[i][mask[i] > 0], bool(cut[i])) for i, c in enumerate(rows) if live[i]]
        self._all(lambda: [self._answer(*x) for x in heard])

    def _answer(self, c: _Conversation, row: int, ids, logp, cut: bool) -> None:
        """One turn of the policy, and what the environment says to it."""
        text, reward, role = self.script.said(ids), 0.0, "user"
        c.turns, c.truncated = c.turns + 1, cut
        if calls := tool_calls(text, c.tools) if c.tools else []:
            c.calls += len(calls)
            said, role = "\n".join(self._ask(row, call, c.tools, *x) for x in calls), "tool"
        else:
            said, reward, c.done = self._ask(row, c.environment.step, text)
            if not isinstance(said, str) or not np.isfinite(reward):
                raise UserError(f"environment {self.name}: step answered {(said, reward, c.done)!r} for row {row}; it returns (text, a finite number, whether it is over)")
        c.add(ids, 1, logp, float(reward))
        c.over = c.done or c.turns == self.turns
        if not c.over:
            more = [*([self.how.stop[0]] if cut and self.how.stop else []), *self.script.reply(said, role)]
            c.over = len(c.ids) + len(more) + self.how.max_new > self.context
        if not c.over:
            c.add(more, 0)

    def _rollout(self, rows: list[_Conversation], row, version) -> tuple[Rollout, Scored]:
        def table(name, kind, empty=0):
            out = np.full((len(rows), self.context), empty, kind)
            for i, c in enumerate(rows):
                out[i, : len(c.ids)] = getattr(c, name)
            return out

        real = np.arange(self.context) < np.array([len(c.ids) for c in rows])[:, None]
        count = lambda f: np.array([f(c) for c in rows], np.float32)
        rollout = Rollout(
            table("ids", np.int32, self.how.pad), table("mask", np.float32), real.astype(np.int32), np.where(real, np.arange(self.context), 0).astype(np.int32),
            table("logp", np.float32), np.asarray(row, np.int32), np.int32(version), count(lambda c: c.truncated),
        )  # fmt: skip
        counted = {"turns": count(lambda c: c.turns), "done": count(lambda c: c.done)}
        if any(c.tools for c in rows):
            counted["tool_calls"] = count(lambda c: c.calls)
        scores = Scored(table("reward", np.float32), {self.name: count(lambda c: sum(c.reward))}, environment=counted)
        return shard.place(rollout, self.mesh), shard.place(scores, self.mesh)
