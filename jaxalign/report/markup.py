"""HTML that is safe by construction: text is escaped unless a `tag` made it."""

from __future__ import annotations

import html
from typing import Any, Iterable

# A reader should see a control character, not feel it. Newline and tab are themselves.
_VISIBLE = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {0x7F: 0x2421}


class Html(str):
    """Markup. Only `tag`, `join` and constants of this package make it; samples, names and configs never do."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """<name attributes>children</name>. `class_` is class, `_` in a name is `-`; floats are pixels (one decimal); None is left out."""
    head = "".join(f' {k.rstrip("_").replace("_", "-")}="{_value(v)}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{name}{head}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    return Html("".join(p if isinstance(p, Html) else escape(p) for p in parts if p is not None))


def escape(x: Any) -> str:
    return html.escape(str(x).translate(_VISIBLE))


def _value(v: Any) -> str:
    return f"{v:.1f}" if isinstance(v, float) else escape(v)
