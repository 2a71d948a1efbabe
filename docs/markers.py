"""What stands in a page where it says `<!-- name: argument -->`: pictures, plots, tables, output.

Everything is made when the site is built, from the library as it is.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import re
import shlex
import textwrap
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import sparse_layouts as sl
from docs.operations import DENSE, GPU, MASKS, operations, routes_of
from sparse_layouts.command_line import main
from sparse_layouts.viewing.benchmark_results import Result, read_results, results_folder
from sparse_layouts.viewing.exploration import exploration
from sparse_layouts.viewing.explorer_page import fragment
from sparse_layouts.viewing.families import FAMILIES
from sparse_layouts.viewing.pattern_picture import svg

MARKER = re.compile(r"^( *)<!-- ([a-z]+)(?:: (.*?))? -->$", re.MULTILINE)


def _evaluated(code: str) -> Any:
    torch.manual_seed(0)
    return eval(code, {"sl": sl, "torch": torch})


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(code: str) -> str:
    """The pattern of a layout, in the colours of the page."""
    return f'<figure class="pattern">{svg(_evaluated(code))}</figure>'


def look(code: str) -> str:
    """What a notebook shows of an object."""
    return f'<div class="shown">{_evaluated(code)._repr_html_()}</div>'


def plot(argument: str) -> str:
    """A matplotlib figure, as an image in the page; `title = code`."""
    title, _, code = argument.partition(" = ")
    return _image(title, _evaluated(code))


def _image(title: str, figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    data = base64.b64encode(out.getvalue()).decode()
    source = f"data:image/svg+xml;base64,{data}"
    return f'<figure class="plot"><img alt="{html.escape(title)}" src="{source}"></figure>'


def _kernels(names: str) -> str:
    if names == DENSE:
        return f"**{names}**"
    return re.sub(r"(?:^|(?<=[,;] ))\w+", r"`\g<0>`", names)


def operations_table(name: str) -> str:
    """What a layout can do, by which kernel: from the two tables."""
    rows = [
        [
            f"`{row.written}`".replace("|", "&#124;"),
            row.op,
            _kernels(row.cpu),
            _kernels(row.gpu),
            _kernels(row.gradients_cpu),
            _kernels(row.gradients_gpu),
        ]
        for row in operations(name)
    ]
    on = f"GPU {GPU[0]}.{GPU[1]}"
    head = ["call", "op or handler", "CPU", on, "gradients, CPU", f"gradients, {on}"]
    return _table(head, rows)


def routes_table(name: str) -> str:
    """The routes for a layout and its bases."""
    rows = [[f"`{f}`", f"`{o}`", f"`{h}`"] for f, o, h in routes_of(getattr(sl, name))]
    return _table(["torch function", "operands", "handler"], rows)


def overview(argument: str) -> str:
    """All layouts, and where the main calls are sparse."""
    wanted = {
        "products": "w @ x, 256 columns",
        "softmax": "torch.softmax(w, -1)",
        "attention mask": "F.scaled_dot_product_attention(q, k, v, mask)",
    }
    rows = []
    for name in MASKS:
        found = {row.written: row for row in operations(name)}
        cells = [f"[{name}]({name}.md)"]
        for call in wanted.values():
            row = found[call]
            places = [p for p, k in (("CPU", row.cpu), ("GPU", row.gpu)) if DENSE not in k]
            cells.append(", ".join(places) or "dense")
        rows.append(cells)
    return _table(["layout", *wanted], rows)


def _result_cells(row: Result) -> list[str]:
    seconds = row.seconds or 0.0
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    time = f"{seconds * scale:.3g}&nbsp;{unit}"
    other = f" of {row.share_of}" if row.of_ceiling == row.share and row.share_of else ""
    against = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.ratios.items())
    return [
        row.name,
        "" if row.density is None else f"{row.density:.1%}",
        time,
        "" if row.of_ceiling is None else f"{row.of_ceiling:.0%}{other}",
        against,
    ]


def _results_by_machine() -> dict[str, list[Result]]:
    by_machine: dict[str, list[Result]] = {}
    for row in read_results():
        by_machine.setdefault(row.machine, []).append(row)
    return by_machine


def rooflines(argument: str) -> str:
    """The committed benchmark results below their roofs, a figure a machine."""
    figures = []
    for machine, rows in _results_by_machine().items():
        if not any(row.drawn for row in rows):
            continue
        files = [results_folder() / file for file in dict.fromkeys(row.file for row in rows)]
        figures.append(_image(machine, sl.roofline(results=files, title=machine)))
    return "\n\n".join(figures)


def results(argument: str) -> str:
    """All committed benchmark results, a section a file."""
    rows, parts = read_results(), []
    head = ["row", "density", "time", "of the ceiling", "times faster than"]
    for file in dict.fromkeys(row.file for row in rows):
        own = [row for row in rows if row.file == file]
        title = file.removesuffix(".json").replace("_", " ")
        table = _table(head, [_result_cells(row) for row in own])
        parts.append(f"### {title}\n\n{own[0].where} (`{file}`)\n\n{table}")
        parts += _shapes(own)
    return "\n\n".join(parts)


def _shapes(rows: list[Result]) -> list[str]:
    """What the rows' names stand for, where the results say so."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        if len(row.notes) == 1:  # several: a line for each matrix of a collection
            by_note.setdefault(row.notes[0], []).append(row.name)
    lines = [f"- {', '.join(names)}: {note}" for note, names in by_note.items()]
    return ["\n".join(lines)] if lines else []


def output(command: str) -> str:
    """What a command of the command line prints in a terminal of 88 columns."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch.object(main, "output_width", return_value=88):
        code = main.main(shlex.split(command))
    if code:
        raise ValueError(f"output: {command} ended with {code}")
    return f"```text\n$ python -m sparse_layouts {command}\n{out.getvalue().rstrip()}\n```"


def explorer(argument: str) -> str:
    """The explorer that works without Python."""
    family = FAMILIES[argument]
    return fragment(exploration(family, {})).replace(" hidden>", ">", 1)


MARKERS: dict[str, Callable[[str], str]] = {
    "picture": picture,
    "look": look,
    "plot": plot,
    "operations": operations_table,
    "routes": routes_table,
    "overview": overview,
    "rooflines": rooflines,
    "results": results,
    "output": output,
    "explorer": explorer,
}


def filled(markdown: str) -> str:
    """A page with its markers replaced. Raises `ValueError` for an unknown one.

    >>> filled("<!-- overview -->").splitlines()[0]
    '| layout | products | softmax | attention mask |'
    """

    def replaced(match: re.Match[str]) -> str:
        indent, name, argument = match[1], match[2], match[3] or ""
        if name not in MARKERS:
            raise ValueError(f"no marker {name!r}; there are {', '.join(MARKERS)}")
        return textwrap.indent(MARKERS[name](argument), indent)

    return MARKER.sub(replaced, markdown)
