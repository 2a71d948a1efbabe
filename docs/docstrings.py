"""The form of this library's docstrings, as Markdown: a griffe extension for mkdocstrings."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|mod|meth|data):`~?([^`]+)`")
STAR = re.compile(r"(?<=[( ])\*(?=[a-z])")  # "(*batch, M, N)" is no emphasis


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Examples and literal blocks fenced, roles as code, stars of shapes as stars; the rest is
    Markdown already.
    """
    lines = ROLE.sub(r"`\1`", text).split("\n")
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.lstrip().startswith(">>> "):
            end = at
            while end < len(lines) and lines[end].strip():
                end += 1
            out += ["```pycon", *textwrap.dedent("\n".join(lines[at:end])).split("\n"), "```"]
            at = end
        elif line.endswith("::"):
            out += [_starred(line[:-1]), ""]
            at += 1
            while at < len(lines) and not lines[at].strip():
                at += 1
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            block = textwrap.dedent("\n".join(lines[at:end])).strip("\n")
            out += ["```text", *block.split("\n"), "```", ""]
            at = end
        else:
            out.append(_starred(line))
            at += 1
    return "\n".join(out)


def _starred(line: str) -> str:
    """The line with stars that are no emphasis; those in code stay as they are."""
    parts = line.split("`")  # every second one is code
    parts[::2] = [STAR.sub(r"\*", part) for part in parts[::2]]
    return "`".join(parts)
