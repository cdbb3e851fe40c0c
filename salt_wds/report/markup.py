"""HTML that cannot be broken by what stands in it: text is escaped where it enters, by construction.

`tag("p", "a < b")` escapes; only what `tag` and `raw` give back is taken as it is. Labels, keys, paths and error messages
come from files of anyone, so nothing here puts text together in any other way.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

_JOINERS = "\u200c\u200d"  # of Persian, of the scripts of India, of emoji; the other invisible characters can mislead
_WITHOUT_END = ("img", "meta", "line", "rect", "path", "circle", "br", "input", "link")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def raw(text: str) -> Markup:
    """Text of our own that is HTML already, such as a style sheet; never anything from a file."""
    return Markup(text)


def tag(name: str, /, *children: str | Iterable[str] | None, **attributes: str | float | bool | None) -> Markup:
    """An element. Children are text, Markup, or iterables of both; None is nothing.

    Attributes: `class_` and `for_` without their underscore, other underscores are hyphens; None and False are left out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
            words.append(key if value is True else f'{key}="{escaped(value)}"')
    opening = f"<{' '.join(words)}>"
    if name in _WITHOUT_END and not children:
        return Markup(opening if name in ("img", "meta", "br", "input", "link") else f"{opening[:-1]}/>")
    return Markup(f"{opening}{join(*children)}</{name}>")


def join(*children: str | Iterable[str] | None) -> Markup:
    """Children one after the other."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escaped(child))
        elif child is not None:
            parts.append(join(*child))
    return Markup("".join(parts))


def escaped(text: object) -> str:
    """Text for an element or an attribute; characters that cannot be shown, or turn the direction of others, as �."""
    shown = "".join(c if c.isprintable() or c in "\n\t" + _JOINERS else "\ufffd" for c in str(text))
    return html.escape(shown)


def data_uri(content: bytes, kind: str) -> str:
    """A picture's bytes, of kind "png" or "jpeg", as an address that needs no network."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
