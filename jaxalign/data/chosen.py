"""Which template a run uses: a built-in one, the tokenizer's own, or a file's."""

from __future__ import annotations

import difflib
import json
import os
from typing import Any, Sequence

from jaxalign.data import hub, jinja
from jaxalign.data.templates import TEMPLATES, Template
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.types import UserError

HF = "hf"  # the chat template that stands beside the tokenizer


def source(name: str, directories: Sequence[str] = ()) -> str | None:
    """Jinja source of a template that is named by its file; None for other names.

    Relative paths are looked for in ``directories`` first; where the file is gone, the copy tokenizer/chat_template.jinja of
    one of them serves. Raises UserError for a name that is none, with the nearest.
    """
    if name in TEMPLATES or name == HF:
        return None
    if not name.endswith(".jinja"):
        close = difflib.get_close_matches(name, [*TEMPLATES, HF], 1)
        hint = f" did you mean {close[0]!r}?" if close else ""
        known = ", ".join(sorted([*TEMPLATES, HF]))
        raise UserError(f"tokenizer.template {name!r} is unknown;{hint} There are {known}, or give the path of a .jinja file")
    kept = [os.path.join(d, "tokenizer", "chat_template.jinja") for d in directories]
    for path in (*(os.path.join(d, name) for d in directories), name, *kept):
        if os.path.isfile(path):
            return jinja.read(path)
    folder = os.path.dirname(name) or "."
    beside = [f for f in os.listdir(folder) if f.endswith(".jinja")] if os.path.isdir(folder) else []
    close = difflib.get_close_matches(os.path.basename(name), beside, 1)
    hint = f"; did you mean {os.path.join(os.path.dirname(name), close[0])!r}?" if close else ""
    raise UserError(f"tokenizer.template: there is no file {name!r}{hint}")


def specials(name: str, text: str | None) -> tuple[str, ...]:
    """Special tokens a template writes, for a vocabulary that is still to be trained."""
    return TEMPLATES[name].specials if name in TEMPLATES else jinja.literals(text or "")


def template(name: str, text: str | None, tokenizer: Tokenizer, variables: str = "") -> tuple[Template | jinja.Jinja, Any]:
    """(template, tokenizer that carries it, so that both are exported together). text: of `source`; variables: JSON.

    Raises UserError for a template that can not be trained with.
    """
    if name in TEMPLATES:
        return TEMPLATES[name], tokenizer
    if text is None:
        text = tokenizer.chat_template
        if not text:
            raise UserError(
                f"tokenizer.template is {HF!r}, but nothing beside the tokenizer holds a chat template; name a .jinja file or one of "
                + ", ".join(TEMPLATES)
            )
    elif text != tokenizer.chat_template and hasattr(tokenizer, "carrying"):
        tokenizer = tokenizer.carrying(hub.with_template(tokenizer.beside, text))
    try:
        values = json.loads(variables or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f'tokenizer.variables {variables!r} must be a JSON object, such as {{"enable_thinking": false}}')
    return jinja.template(text, tokenizer, name, values), tokenizer
