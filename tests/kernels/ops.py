"""What the kernel tests know of every op, by discovery.

The ops on blocks are in `cases.py` and `accuracy.py`. Each further family has a module
`cases_<family>.py` in this folder, which exports, by op name:

name | what
---|---
`OPS` | its cases, `list[Case]`
`DENSE` | the same in dense torch, step by step, `(Arithmetic, *args, **kwargs) -> Results`
`ZEROS` | what is exactly 0 in its results, `(Call) -> tuple[Tensor | None, ...]`; no entry: nothing
`EXAMPLES` | the name of a case in which something is 0 by definition and the operands are not few
`ROUNDED_TO` | the dtype to which an op rounds inside, where not the operands'; may be absent
"""

from __future__ import annotations

import functools
import importlib
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tests.kernels import cases
from tests.kernels.cases import Case


@functools.cache
def families() -> tuple[ModuleType, ...]:
    """The modules `cases_<family>.py`."""
    names = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("cases_*.py"))
    return tuple(importlib.import_module(f"tests.kernels.{name}") for name in names)


@functools.cache
def all_cases() -> dict[str, list[Case]]:
    """The cases of every op."""
    found = dict(cases.OPS)
    for family in families():
        found.update(family.OPS)
    return found


def exported(table: str, op: str) -> Any:
    """An op's entry in a table of its family, None without one."""
    for family in families():
        if op in getattr(family, table, {}):
            return getattr(family, table)[op]
    return None


def dense_of(op: str) -> Callable[..., Any]:
    """The op in dense torch."""
    from tests.kernels import accuracy

    return accuracy.DENSE.get(op) or exported("DENSE", op)


def example_of(op: str) -> str:
    """The name of the case by which the comparison itself is judged."""
    return cases.EXAMPLES.get(op) or exported("EXAMPLES", op)
