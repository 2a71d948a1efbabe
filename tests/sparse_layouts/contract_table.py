"""The contract table: which behaviour was seen on which layout, printed at the end of a test run.

A test that is part of the contract says of which behaviour, `@pytest.mark.contract("files")`, and
is parametrised by layout; the layout's class is the part of its id that ends in "Tensor". The table
is put together from the reports' properties, so that it is complete under xdist too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# behaviour -> whether it is one of masks (and not of layouts with values)
BEHAVIOURS: dict[str, bool] = {
    "dense form": False,
    "copies": False,
    "files": False,
    "state dicts": False,
    "dtypes and devices": False,
    "printing and hashing": False,
    "indexing and rows": False,
    "products and einsum": False,
    "optimizers": False,
    "clipping": False,
    "accumulation": False,
    "autocast": False,
    "checkpointing": False,
    "torch.func": False,
    "GradScaler": False,
    "compiled step": False,
    "dynamic batch": False,
    "export": False,
    "data loaders": False,
    "processes": False,
    "DDP": False,
    "masks: copies and files": True,
    "masks: buffers": True,
    "masks: attention modules": True,
}
PROPERTY = "contract"
_LAYOUT = re.compile(r"[\[-](\w+Tensor)(?=[-\]])")
_MARKS = {"passed": "+", "skipped": "s", "failed": "X"}


class Cell(NamedTuple):
    """One layout's class and one behaviour."""

    layout: str
    behaviour: str


def cell_of(test_name: str, behaviour: str) -> Cell:
    """The cell that a test fills; raises `ValueError` for an unknown behaviour or a test without a
    layout in its id.
    """
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"{test_name}: no behaviour {behaviour!r} in {__name__}.BEHAVIOURS")
    found = _LAYOUT.search(test_name)
    if found is None:
        raise ValueError(f"{test_name}: a contract test is parametrised by layout; no id names one")
    return Cell(found.group(1), behaviour)


def table(outcomes: Iterable[tuple[Cell, str]]) -> list[str]:
    """The table's lines, from cells and outcomes ("passed", "failed", "skipped"), any number a
    cell; no lines for no outcome.
    """
    seen: dict[Cell, set[str]] = {}
    for cell, outcome in outcomes:
        seen.setdefault(cell, set()).add(outcome)
    columns = [name for name in BEHAVIOURS if any(cell.behaviour == name for cell in seen)]
    rows = sorted({cell.layout for cell in seen})
    if not rows:
        return []
    of_masks = {cell.layout for cell in seen if BEHAVIOURS[cell.behaviour]}
    width = max(map(len, rows))

    def mark(layout: str, behaviour: str) -> str:
        found = seen.get(Cell(layout, behaviour))
        if found is None:
            return "." if BEHAVIOURS[behaviour] and layout not in of_masks else "-"
        return next(_MARKS[o] for o in ("failed", "passed", "skipped") if o in found)

    numbers = [str(list(BEHAVIOURS).index(name) + 1) for name in columns]
    lines = [" " * width + "".join(f"{n:>3}" for n in numbers)]
    for layout in rows:
        marks = "".join(f"{mark(layout, name):>3}" for name in columns)
        lines.append(f"{layout:<{width}}{marks}")
    legend = "  ".join(f"{n} {name}" for n, name in zip(numbers, columns, strict=True))
    while legend:
        cut = len(legend) if len(legend) <= 96 else legend.rfind("  ", 0, 98)
        lines.append(legend[:cut].strip())
        legend = legend[cut:].strip()
    lines.append("+ passed  X failed  s skipped  - no test ran  . has no masks")
    return lines
