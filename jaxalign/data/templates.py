"""Examples -> segments of text that know whether they are trained -> ids and mask.

The mask is decided while writing, never found by searching ids. What is trained: every assistant turn and the stop
token that ends it, and nothing else (all of a plain text). Prompt and answers are tokenised apart, so the tokens of a
prompt are a prefix of the tokens of prompt + completion: what the sampler continues is what the trainer saw.

User text is never parsed: "<|im_end|>" in a message is spelled out, only the template writes special tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Iterable, Iterator, NamedTuple, Sequence

from jaxalign.data.examples import Chat, Completion, Example, Label, Message, Preference, Prompt, Ranking, Said, Steps, Text, Trajectory
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.types import UserError


class Segment(NamedTuple):
    text: str
    trained: int = 0  # 1: these tokens are targets. In an answer of judged steps, the number of the step
    # "text"; "answer" (never merged with its surroundings); "special"; "stop" (ends a turn); "start" (PAD, which opens the
    # decoder's part); "opened" (comes first, says nothing: the template writes BOS itself, or wants none)
    kind: str = "text"


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are written. A turn is ``before[role] + content + after[role]``; an assistant's turn is a header, the
    answer and the stop token, of which the last two are trained.

    ``stop`` names the special token that ends a turn; a vocabulary without it ends turns with EOS.
    """

    name: str
    system: tuple[str, str] = ("", "")  # before, after
    user: tuple[str, str] = ("", "")
    header: str = ""  # opens the assistant's turn; the last thing in a prompt
    lead: str = ""  # what the assistant writes before its answer (a space)
    between: str = ""  # after the stop token, when another turn follows
    stop: str | None = None
    specials: tuple[str, ...] = ()  # special tokens in the texts above
    chat: bool = True  # False: has no way to write roles

    def prompt(self, prompt: Said) -> list[Segment]:
        """Segments of a prompt, up to where the assistant speaks. Nothing in it is trained.

        Raises UserError for messages under a template that has no roles.
        """
        if not self.chat:
            if isinstance(prompt, str):
                return [Segment(prompt)]
            raise UserError(
                f"template {self.name!r} can not write messages; use 'chatml' or 'human_assistant', or string prompts"
            )
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        return [s._replace(trained=False) for s in self._turns(turns)] + self._fixed(self.header)

    def answer(self, answer: Said, trained: bool = True) -> list[Segment]:
        """Segments that follow `prompt`: the answer (or the messages from an assistant's turn on) and its stop."""
        if isinstance(answer, str):
            return [Segment(self.lead + answer, trained, "answer"), Segment(self.stop or "", trained, "stop")]
        return self._turns(answer)[len(self._fixed(self.header)) :]

    def completion(self, prompt: Said, answer: Said) -> list[Segment]:
        """Segments of a prompt and what follows it."""
        return self.prompt(prompt) + self.answer(answer)

    def conversation(self, messages: Sequence[Message]) -> list[Segment]:
        """Segments of a whole conversation, every assistant turn trained unless its message says otherwise."""
        first = next(i for i, m in enumerate(messages) if m.role == "assistant")
        return self.prompt(tuple(messages[:first])) + self.answer(tuple(messages[first:]))

    def _turns(self, messages: Sequence[Message]) -> list[Segment]:
        out: list[Segment] = []
        for i, m in enumerate(messages):
            if i and messages[i - 1].role == "assistant":
                out += self._fixed(self.between)
            if m.role == "tool" or m.calls:
                raise UserError(f"template {self.name!r} can not write calls of tools; use a chat template (tokenizer.template=hf, or a .jinja file)")
            if m.role == "assistant":
                out += self._fixed(self.header) + self.answer(m.content, m.trained)
            else:
                before, after = self.system if m.role == "system" else self.user
                out += [*self._fixed(before), Segment(m.content), *self._fixed(after)]
        return out

    def _fixed(self, text: str) -> list[Segment]:
        """The template's own text, cut at its special tokens."""
        parts = re.split("(" + "|".join(map(re.escape, self.specials)) + ")", text) if self.specials else [text]
        return [Segment(p, kind="special" if p in self.specials else "text") for p in parts if p]


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(Template):
    """The prompt is what the encoder reads, EOS behind it as T5 was trained; PAD then opens the decoder's part, as in T5."""

    def prompt(self, prompt: Said) -> list[Segment]:
        if not isinstance(prompt, str):
            prompt = "\n\n".join(m.content for m in prompt)
        return [Segment(prompt), Segment("", kind="stop"), Segment("", kind="start")]

    def answer(self, answer: Said, trained: bool = True) -> list[Segment]:
        if not isinstance(answer, str):
            if len(answer) != 1 or answer[0].role != "assistant":
                raise UserError(f"template {self.name!r} writes one answer to one prompt; give conversations that end with the first assistant turn")
            answer, trained = answer[0].content, answer[0].trained
        return [Segment(answer, trained, "answer"), Segment("", trained, "stop")]


PLAIN = Template("plain", chat=False)
ENCODER_DECODER = EncoderDecoder("encoder_decoder", chat=False)

CHATML = Template(
    "chatml",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    header="<|im_start|>assistant\n",
    between="\n",
    stop="<|im_end|>",
    specials=("<|im_start|>", "<|im_end|>"),
)

# As HH-RLHF writes its dialogues. Those show no end of turn; without one a policy would go on to play the human.
HUMAN_ASSISTANT = Template(
    "human_assistant",
    system=("\n\nSystem: ", ""),
    user=("\n\nHuman: ", ""),
    header="\n\nAssistant:",
    lead=" ",
)

TEMPLATES = {t.name: t for t in (PLAIN, CHATML, HUMAN_ASSISTANT, ENCODER_DECODER)}


def segments(example: Example, template: Template) -> list[list[Segment]]:
    """The sequences of an example: one, but two for a Preference (chosen, rejected) and K for a Ranking."""
    match example:
        case Text() if isinstance(template, EncoderDecoder):
            raise UserError("a text has no prompt for the encoder to read; an encoder-decoder trains on prompts and completions")
        case Text(text):
            return [[Segment(text, True), Segment("", True, "stop")]]
        case Prompt(prompt):
            return [template.prompt(prompt)]
        case Completion(prompt, completion) | Label(prompt, completion):
            return [template.completion(prompt, completion)]
        case Chat(messages):
            return [template.conversation(messages)]
        case Trajectory(said):
            return segments(said, template)
        case Steps(prompt, steps):
            return [_stepped(template.completion(prompt, "".join(steps)), steps, template.name)]
        case Preference(prompt, chosen, rejected):
            return [template.completion(prompt, a) for a in (chosen, rejected)]
        case Ranking(prompt, completions):
            return [template.completion(prompt, a) for a in completions]
    raise UserError(f"{type(example).__name__} is no example; return one of the classes in jaxalign.data.formats")


def _stepped(sequence: Sequence[Segment], steps: Sequence[str], name: str) -> list[Segment]:
    """The answer cut at its steps, each tokenised alone and `trained` by its number, from 1 on; what follows belongs to the last."""
    at, body = max((i for i, s in enumerate(sequence) if s.trained and s.kind != "stop"), default=0), "".join(steps)
    before, found, after = sequence[at].text.partition(body)
    if not found:
        raise UserError(f"template {name!r} does not write the steps of an answer as they are; give steps without blanks at their ends, or another template")
    texts = [*steps[:-1], steps[-1] + after]
    texts[0] = before + texts[0]
    rest = [s._replace(trained=len(steps)) if s.trained else s for s in sequence[at + 1 :]]
    return [*sequence[:at], *(Segment(t, k, "answer") for k, t in enumerate(texts, 1)), *rest]


def encode_sequences(
    sequences: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    add_bos: bool = True,
    add_eos: bool = True,
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each sequence; mask[t] = 1 makes token t a target, mask[0] is 0.

    BOS comes once, first, untrained (if the vocabulary has one, and the template does not see to it itself).
    ``add_eos=False`` leaves out the last stop token.
    """
    bos = tokenizer.bos_id
    plans = []
    for s in sequences:
        plan = _plan(s if add_eos else _unstopped(s), tokenizer)
        own = s and s[0].kind == "opened" or plan[:1] == [(bos, False)]
        plans.append([(bos, False), *plan] if add_bos and bos is not None and not own else plan)
    # Each text once: the candidates of a ranking share their prompt. What opens a document may follow its BOS.
    first = [int(plan[:1] == [(bos, False)]) for plan in plans]
    texts = {(x, i == n): None for plan, n in zip(plans, first) for i, (x, _) in enumerate(plan) if isinstance(x, str)}
    ids = dict(zip(texts, tokenizer.encode_batch([t for t, _ in texts], [start for _, start in texts])))
    out = []
    for plan, n in zip(plans, first):
        tokens, mask = [], []
        for i, (x, trained) in enumerate(plan):
            piece = ids[x, i == n] if isinstance(x, str) else [x]
            tokens += piece
            mask += [int(trained)] * len(piece)
        if mask:
            mask[0] = 0  # nothing comes before the first token that could predict it
        out.append((tokens, mask))
    return out


def encode_example(
    example: Example, tokenizer: Tokenizer, template: Template, add_bos: bool = True, add_eos: bool = True
) -> tuple[list[int], list[int]]:
    """(ids, mask) of an example with one sequence (text, completion, chat, prompt)."""
    sequences = segments(example, template)
    if len(sequences) != 1:
        raise UserError(f"a {type(example).__name__} has {len(sequences)} sequences; use segments and encode_sequences")
    return encode_sequences(sequences, tokenizer, add_bos, add_eos)[0]


def encode_prompt(prompt: Said, tokenizer: Tokenizer, template: Template, add_bos: bool = True) -> list[int]:
    """Ids of a prompt, ready to be continued: a prefix of the ids of every example that has it."""
    return encode_sequences([template.prompt(prompt)], tokenizer, add_bos)[0][0]


def stop_ids(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """Ids that end an answer: what a sampler must stop at. The first is what training teaches."""
    return tuple(dict.fromkeys([_stop(template.stop, tokenizer), tokenizer.eos_id]))


def _plan(sequence: Iterable[Segment], tokenizer: Tokenizer) -> list[tuple[str | int, bool]]:
    """Texts to tokenise and ids that stand: special tokens resolved, neighbouring prompt texts joined."""
    resolved: list[tuple[str | int, bool, bool]] = []
    for text, trained, kind in sequence:
        x = tokenizer.special_id(text) if kind == "special" else _stop(text, tokenizer) if kind == "stop" else tokenizer.pad_id if kind == "start" else None
        if x is None and text:
            resolved.append((text, trained, kind == "answer"))
        elif x is not None:
            resolved.append((x, trained, False))
    return list(_joined(resolved))


def _joined(items: list[tuple[str | int, bool, bool]]) -> Iterator[tuple[str | int, bool]]:
    for (kind, trained), run in itertools.groupby(items, key=lambda s: (isinstance(s[0], str) and not s[2], s[1])):
        run = [x for x, *_ in run]
        if kind:
            yield "".join(run), trained
        else:
            yield from ((x, trained) for x in run)


def _stop(name: str | None, tokenizer: Tokenizer) -> int:
    found = tokenizer.special_id(name) if name else None
    return tokenizer.eos_id if found is None else found


def _unstopped(sequence: Sequence[Segment]) -> Sequence[Segment]:
    return sequence[:-1] if sequence and sequence[-1].kind == "stop" else sequence
