"""`sl.trace()`: what eager calls really took."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from sparse_layouts.dispatch import settings
from sparse_layouts.dispatch.text import html_table, terminal_width, text_table

if TYPE_CHECKING:
    from sparse_layouts.dispatch.kernel_table import Facts


class Step(NamedTuple):
    """One thing that ran: an op's kernel, a torch function on densified operands (`kernel` is
    "dense fallback"), or a route from outside this library (`kernel` is the handler).
    """

    what: str
    kernel: str
    device: str
    dtype: str
    dense_bytes: int


class Trace:
    """The steps recorded so far, in order; a sequence of :class:`Step`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]

    def _rows(self) -> list[list[str]]:
        return [[s.what, s.kernel, s.device, s.dtype, f"{s.dense_bytes:,}"] for s in self.steps]

    _HEAD = ("op or function", "kernel", "device", "dtype", "bytes densified")

    def __repr__(self) -> str:
        if not self.steps:
            return "nothing ran"
        return text_table(self._HEAD, self._rows(), width=terminal_width())

    def _repr_html_(self) -> str:
        if not self.steps:
            return html.escape("nothing ran")
        return html_table(self._HEAD, self._rows())


class trace(settings._Setting):
    """Records which kernel each eager call took, forward and backward, and which calls were
    densified.

    Compiled code chooses its kernels while it runs, and is recorded as well; what `torch.compile`
    densifies while it traces is not.

    >>> import torch, sparse_layouts as sl
    >>> w = sl.bsr(torch.eye(64), block_size=16)
    >>> with sl.trace() as steps:
    ...     y = w @ torch.ones(64, 2)
    >>> [(s.what, s.kernel) for s in steps]
    [('block_matmul', 'cpu')]
    """

    def __init__(self) -> None:
        self._trace = Trace()
        super().__init__(settings.current()._replace(trace=self._trace))

    def __enter__(self) -> Trace:  # type: ignore[override]
        return self._trace


def record(what: str, kernel: str, facts: Facts, dense_bytes: int) -> None:
    """Adds a step to the trace in force, if there is one."""
    found = settings.current().trace
    if found is not None:
        found.steps.append(Step(what, kernel, *described(facts), dense_bytes))


def described(facts: Facts) -> tuple[str, str]:
    """The device and dtype as a step shows them."""
    return facts.device, str(facts.dtype).removeprefix("torch.")
