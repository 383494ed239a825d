"""What `sample` and `chat` share: their flags, the model they open, and one answer as it comes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Callable, NamedTuple

from absl import flags

from jaxalign.types import UserError

CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {i: 0xFFFD for i in range(0x7F, 0xA0)}
SETTINGS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def define(fv: flags.FlagValues, max_new: int) -> None:
    flags.DEFINE_string("run", None, "a stage's directory (runs/quickstart/ppo), or a Hugging Face directory", flag_values=fv)
    flags.DEFINE_string("adapter", None, "a PEFT directory, or a stage with adapters, on top of it", flag_values=fv)
    flags.DEFINE_string("template", None, "plain, chatml, human_assistant, hf or a .jinja file; default: the model's own", flag_values=fv)
    flags.DEFINE_string("tokenizer", None, "a file, a directory or bytes, where the model comes without one; default: the model's own", flag_values=fv)
    flags.DEFINE_string("system", None, "the system prompt", flag_values=fv)
    flags.DEFINE_integer("max_new", max_new, "tokens at most", lower_bound=1, flag_values=fv)
    own = "default: what generation_config.json says, else"
    flags.DEFINE_float("temperature", None, f"0 is greedy; {own} 1", lower_bound=0.0, flag_values=fv)
    flags.DEFINE_integer("top_k", None, f"0: all; {own} 0", lower_bound=0, flag_values=fv)
    flags.DEFINE_float("top_p", None, f"1: all; {own} 1", lower_bound=0.0, upper_bound=1.0, flag_values=fv)
    flags.DEFINE_float("beta", 1.0, "of a stage with Q heads (ILQL): how much advantages weigh; 0: the policy alone", lower_bound=0.0, flag_values=fv)
    flags.DEFINE_float("adv_clip", None, "of such a stage: the largest advantage; default: any", flag_values=fv)
    flags.DEFINE_multi_string("stop", [], "end an answer before this text; may be given several times", flag_values=fv)
    flags.DEFINE_integer("seed", 0, "of the random draws", flag_values=fv)


class Speaker(NamedTuple):
    """A model ready to continue texts."""

    w: Any  # World
    params: Any
    how: Any  # Sampling
    stops: tuple[str, ...]  # stop strings
    notes: list[str]  # what was decided without being asked

    def decode(self, ids) -> str:
        """Text of a completion; the token that ended it says nothing, whatever its text."""
        ids = [int(i) for i in ids]
        return self.w.decode(ids[:-1] if ids and ids[-1] in self.how.stop else ids)


def opened(fv: flags.FlagValues, verb: str) -> Speaker:
    from jaxalign import build

    if not fv.run:
        raise UserError(f"--run is missing: jaxalign {verb} --run=runs/quickstart/ppo" + (" --prompt='Review the noodle soup.'" if verb == "sample" else ""))
    if "" in fv.stop:
        raise UserError("--stop is empty: it would end every answer before it begins")
    w, _, params = build.trained(fv.run, template=fv.template or "", tokenizer=fv.tokenizer or "", adapter=fv.adapter or "", writes=True, beta=fv.beta, clip=fv.adv_clip)
    g = build.generation(w)
    given = {k: fv[k].value for k in SETTINGS if fv[k].value is not None}
    how = build.sampling(w, {}, max_new=fv.max_new, **{**SETTINGS, **g.settings, **given})
    how = dataclasses.replace(how, stop=tuple(dict.fromkeys((*how.stop, *g.stop))))
    taken = {k: v for k, v in g.settings.items() if k not in given}
    notes = [f"{', '.join(f'{k} {v:g}' for k, v in taken.items())}: from {g.path}; flags of the same names win"] if taken else []
    return Speaker(w, params, how, tuple(fv.stop), notes)


class Answer(NamedTuple):
    text: str
    reason: str  # stop (a stop token), string (a stop string), length or interrupted
    tokens: int  # generated, the stop token included


def answer(s: Speaker, stream, ids: list[int], how, key, row: int, show: Callable[[str], None]) -> Answer:
    """One answer to a prompt of these ids. `show` gets its text in pieces, as soon as they are certain.

    Ctrl-C ends the answer and is not passed on.
    """
    from jaxalign.data.detokenize import Detokenizer, Stops

    t = s.w.tokenizer
    text, stops, parts = Detokenizer(t, {t.bos_id, t.eos_id, t.pad_id} - {None}), Stops(s.stops), []
    reason, count = "length", 0

    def put(piece: str) -> None:
        if piece:
            parts.append(piece)
            show(piece)

    try:
        for i in stream.generate(ids, how, key, row=row):
            count += 1
            if i in how.stop:
                reason = "stop"
                break
            put(stops.push(text.push(i)))
            if stops.found is not None:
                reason = "string"
                break
    except KeyboardInterrupt:
        reason = "interrupted"
    if reason != "string":
        put(stops.push(text.finish()))
        reason = "string" if stops.found is not None else reason
        put(stops.finish())
    return Answer("".join(parts), reason, count)


def shown(piece: str) -> None:
    """To the terminal, now. What a model writes must not steer it: control characters are shown, not sent."""
    sys.stdout.write(piece.translate(CONTROLS) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def note(text: str) -> None:
    """What is not the model's goes to stderr, so that a pipe holds answers only."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)
