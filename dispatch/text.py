"""Small tables and numbers for people: as text that fits a terminal, and as HTML for notebooks."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Sequence

GAP = 2
NARROWEST_COLUMN = 6


def terminal_width() -> int:
    """Columns of the terminal, 80 where there is none; `COLUMNS` in the environment says others."""
    return shutil.get_terminal_size().columns


def folded(text: str, width: int, hanging: str = "") -> list[str]:
    """The text in lines of at most `width`: broken at spaces, a longer word after one of `.:,/_`,
    or where it must; all but the first begin with `hanging`.

    >>> folded("which kernel, and why", 14, hanging="  ")
    ['which kernel,', '  and why']
    >>> folded("kernels.block_matmul:run", 16)
    ['kernels.block_', 'matmul:run']
    """
    lines: list[str] = []
    line = ""
    for word in re.findall(r"\S+\s*|^\s+", text):
        while len(line) + len(word.rstrip()) > width:
            start = len(hanging) if lines else 0
            if len(line) > start:
                lines.append(line.rstrip())
                line = hanging
                continue
            room = max(1, width - len(line))
            ends = [m.end() for m in re.finditer(r"[.:,/_]", word) if m.end() <= room]
            cut = ends[-1] if ends else room
            lines.append(line + word[:cut])
            line, word = hanging, word[cut:]
        line += word
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


def _fitting(widths: list[int], room: int) -> list[int]:
    """Widths that add up to `room` at most: the widest columns give way, down to
    `NARROWEST_COLUMN`.
    """
    widths = list(widths)
    while sum(widths) > room:
        widest = max(widths)
        if widest <= NARROWEST_COLUMN:
            break
        below = max((w for w in widths if w < widest), default=NARROWEST_COLUMN)
        most = [i for i, w in enumerate(widths) if w == widest]
        step = min(widest - max(below, NARROWEST_COLUMN), -(-(sum(widths) - room) // len(most)))
        for i in most:
            widths[i] -= max(1, step)
    return widths


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "", width: int | None = None
) -> str:
    """Columns aligned to the left, two spaces between them; where that is wider than `width`, the
    widest columns are folded.

    >>> print(text_table(("op", "kernel"), [("block_matmul", "cpu")], width=12))
    op      kernel
    ------  ------
    block_  cpu
    matmul
    """
    natural = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    widths = natural
    if width is not None:
        widths = _fitting(natural, width - len(indent) - GAP * (len(head) - 1))
    between = " " * GAP

    def lines_of(row: Sequence[str]) -> list[str]:
        cells = [folded(str(cell), w) for cell, w in zip(row, widths, strict=True)]
        found = []
        for i in range(max(len(cell) for cell in cells)):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            padded = [part.ljust(w) for part, w in zip(parts, widths, strict=True)]
            found.append(indent + between.join(padded).rstrip())
        return found

    rule = indent + between.join("-" * w for w in widths)
    return "\n".join([*lines_of(head), rule, *(line for row in rows for line in lines_of(row))])


def html_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], strong: Sequence[int] = ()
) -> str:
    """The same as an HTML table; every cell is escaped, the rows numbered in `strong` are bold."""
    left = 'style="text-align:left"'  # notebooks align to the right
    cells = "".join(f"<th {left}>{html.escape(str(c))}</th>" for c in head)
    body = ""
    for i, row in enumerate(rows):
        before, after = ("<b>", "</b>") if i in strong else ("", "")
        columns = (f"<td {left}>{before}{html.escape(str(c))}{after}</td>" for c in row)
        body += f"<tr>{''.join(columns)}</tr>"
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def readable_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
