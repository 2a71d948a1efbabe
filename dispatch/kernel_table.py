"""The table of kernels: for every op its implementations, most special first, each with what it
requires.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from sparse_layouts.dispatch import settings
from sparse_layouts.dispatch.tracing import record

F = TypeVar("F", bound=Callable[..., Any])


class Facts(NamedTuple):
    """What a kernel's requirements may look at: nothing that needs the tensors' contents, hashable,
    the same for equal calls.

    `capability` is (0, 0) off CUDA, `triton` the installed version or () without one. What an op
    has not is 0: `block_size`, `head_dim`, `n_of_m` (of an n:m layout), `columns` (of the dense
    operand of a product, rounded up to a power of two, so that lengths do not make new choices),
    `transposed` (whether an n:m or CSR product is one with the transpose of what is stored),
    `row_entries` (of a CSR product, the mean of a row, rounded up to a power of two), `divisor`
    (the largest power of two up to 64 that divides both sizes of the layout's matrix), `order` (how
    the entries of an n:m layout lie) and `fragments` (whether its sizes have that order).
    `cusparselt`: whether torch has that library, False off CUDA. `deterministic`: whether
    `torch.use_deterministic_algorithms` is set, told only by ops that have a kernel without that
    promise. Of attention: whether there is a `bias`, whether its operands are sequences of several
    `lengths`, and bytes of the scores that a key head stores (`head_bytes`; 0 if few, and off
    Hopper), and with small blocks how alike neighbours are (`fill`: how many sixteenths are stored
    of what tiles of 64 rows visit, for gradients also tiles of 64 columns, rounded down; 0 for
    larger blocks, sequences, and off Hopper). `tma`: whether Hopper's copy engine can read the
    operands, in products by blocks also copies of them that pay, and write the result (False off
    Hopper). `partial`: whether a sampled product's pattern has blocks that are stored in part, or
    that reach over the matrix's edge. `sixteenths`: of a product's large block matrix, how many
    sixteenths are stored, rounded down (0 for one of less than 2**22 entries). `long_rows`: whether
    a product has so few and so long block rows that these have to be cut to fill a GPU. A sampled
    product's `columns` are those that it contracts.
    """

    device: str
    dtype: torch.dtype
    capability: tuple[int, int] = (0, 0)
    triton: tuple[int, ...] = ()
    block_size: tuple[int, int] = (0, 0)
    head_dim: int = 0
    n_of_m: tuple[int, int] = (0, 0)
    columns: int = 0
    transposed: bool = False
    divisor: int = 0
    cusparselt: bool = False
    row_entries: int = 0
    deterministic: bool = False
    order: str = ""
    fragments: bool = False
    bias: bool = False
    lengths: bool = False
    tma: bool = False
    head_bytes: int = 0
    fill: int = 0
    partial: bool = False
    sixteenths: int = 0
    long_rows: bool = False


Requires = Callable[[Facts], "str | None"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One row of the table.

    `implementation` is a function, or `"module:function"`, imported when first run.
    """

    op: str
    name: str
    implementation: str | Callable[..., Any]
    requires: Requires
    place: str

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The implementation itself; imports its module."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def source(self) -> str:
        """Where the implementation is, without importing it."""
        if isinstance(self.implementation, str):
            return self.implementation
        return f"{self.implementation.__module__}:{self.implementation.__qualname__}"


class Verdict(NamedTuple):
    """One kernel's answer to a call: `reason` is None if it could take the call."""

    kernel: Kernel
    reason: str | None
    chosen: bool


class KernelTable:
    """Rows by op, and the choices made so far (a function of facts and settings alone)."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Kernel]] = {}
        self.chosen: dict[Any, Kernel | None] = {}
        self.changes = 0  # what was chosen before a change may be wrong after it


KERNELS = KernelTable()


def place_of_caller(depth: int = 2) -> str:
    """`file:line` of the code that called the caller."""
    frame = sys._getframe(depth)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def takes_everything(facts: Facts) -> str | None:
    """The requirement of a kernel that has none."""
    return None


def register_kernel(
    op: str,
    name: str,
    implementation: str | Callable[..., Any],
    requires: Requires = takes_everything,
    *,
    first: bool = False,
    place: str | None = None,
) -> Kernel:
    """Adds a kernel to an op, at the end or, with `first`, before all others.

    A name taken in that op is an error.
    """
    rows = KERNELS.rows.setdefault(op, [])
    place = place or place_of_caller()
    for row in rows:
        if row.name == name:
            raise ValueError(
                f"kernel {name!r} of {op!r} is registered twice: at {row.place} and at {place}. "
                "Give one another name, or call .unregister() on the first."
            )
    kernel = Kernel(op, name, implementation, requires, place)
    rows.insert(0 if first else len(rows), kernel)
    KERNELS.chosen.clear()
    KERNELS.changes += 1
    return kernel


def unregister_kernel(kernel: Kernel) -> None:
    """Takes a row out of the table; a second time does nothing."""
    rows = KERNELS.rows.get(kernel.op, [])
    if kernel in rows:
        rows.remove(kernel)
    KERNELS.chosen.clear()
    KERNELS.changes += 1


def kernel(
    op: str, *, requires: Requires = takes_everything, name: str | None = None
) -> Callable[[F], F]:
    """Registers the decorated function as a kernel of `op`, before all that are there.

    The function takes what the op's reference takes (`sl.explain` names it). `requires(facts)`
    returns None, or one line why the kernel cannot take such a call. The function gets
    `.unregister()`.

    Raises `ValueError` for an unknown op or a name already taken.

    >>> import torch, sparse_layouts as sl
    >>> from sparse_layouts.kernels.block_matmul.reference import block_matmul
    >>> def requires(facts):
    ...     return None if facts.device == "cpu" else "works on cpu tensors"
    >>> @sl.kernel("block_matmul", requires=requires)
    ... def slow_block_matmul(values, pattern, x, *, transposed_output=False):
    ...     return block_matmul(values, pattern, x, transposed_output=transposed_output)
    >>> slow_block_matmul.unregister()
    """
    place = place_of_caller()

    def register(function: F) -> F:
        if op not in KERNELS.rows:
            raise ValueError(f"kernel: no op {op!r}; there are {', '.join(sorted(KERNELS.rows))}")
        row = register_kernel(
            op, name or function.__name__, function, requires, first=True, place=place
        )
        function.unregister = functools.partial(unregister_kernel, row)  # type: ignore[attr-defined]
        return function

    return register


def kernels_of(op: str) -> list[Kernel]:
    """The op's rows, most special first. Raises `ValueError` for an unknown op."""
    if op not in KERNELS.rows:
        raise ValueError(f"no op {op!r}; there are {', '.join(sorted(KERNELS.rows))}")
    return list(KERNELS.rows[op])


@functools.cache
def triton_version() -> tuple[int, ...]:
    """The installed Triton's version, () where there is none; does not import it."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, (0, 0) for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def facts_of(tensor: torch.Tensor, **more: Any) -> Facts:
    """The facts of a call on `tensor`'s device and dtype."""
    device = tensor.device
    return Facts(
        device.type,
        tensor.dtype,
        capability_of(device),
        triton_version(),
        cusparselt=device.type == "cuda" and torch.backends.cusparselt.is_available(),
        **more,
    )


def verdicts(op: str, facts: Facts) -> list[Verdict]:
    """Every kernel of the op with its answer; what :func:`choose` takes is marked."""
    forced = dict(settings.current().choices).get(op)
    found = False
    answers = []
    for row in kernels_of(op):
        reason = row.requires(facts)
        if forced is not None and row.name != forced:
            reason = reason or f"kernel_choice asks for {forced!r}"
        chosen = reason is None and not found
        found = found or chosen
        answers.append(Verdict(row, reason, chosen))
    return answers


def choose(op: str, facts: Facts) -> Kernel | None:
    """The first kernel whose requirements hold, or None.

    A kernel that was asked for by name and cannot take the call raises.
    """
    key = (op, facts, settings.current().choices)
    try:
        return KERNELS.chosen[key]
    except KeyError:
        pass
    row = next((v.kernel for v in verdicts(op, facts) if v.chosen), None)
    forced = dict(settings.current().choices).get(op)
    if row is None and forced is not None:
        why = next(v.reason for v in verdicts(op, facts) if v.kernel.name == forced)
        raise NotImplementedError(f"{op}: the kernel {forced!r} that was asked for cannot: {why}")
    KERNELS.chosen[key] = row
    return row


def run(
    op: str,
    facts: Facts,
    reference: Callable[..., Any],
    dense_bytes: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs the chosen kernel of `op`; where there is none, the op's dense reference, under the
    fallback policy.

    `dense_bytes` is what the reference makes dense. A kernel that raises is an error, never a
    reason to try another.
    """
    row = choose(op, facts)
    if row is None:
        from sparse_layouts.dispatch.fallback import permit

        permit(kernel_missing(op, facts, reference), dense_bytes, facts.device, op)
        record(op, "dense fallback", facts, dense_bytes)
        function = reference
    else:
        record(op, row.name, facts, 0)
        function = row.function
    if facts.device == "meta" or not torch.is_autocast_enabled(facts.device):
        return function(*args, **kwargs)
    # the op has cast its operands: an implementation's own steps in torch are not cast once more
    with torch.autocast(facts.device, enabled=False):
        return function(*args, **kwargs)


def kernel_missing(op: str, facts: Facts, reference: Callable[..., Any]) -> str:
    """Why no kernel took the call, and the stub of one that would."""
    reasons = "\n".join(f"  {v.kernel.name}: {v.reason}" for v in verdicts(op, facts))
    return (
        f"{op} has no kernel for {facts.dtype} on {facts.device}:\n{reasons}\n"
        f"{kernel_stub(op, facts, reference)}"
    )


def kernel_stub(op: str, facts: Facts, reference: Callable[..., Any]) -> str:
    """Code to paste: a kernel row for such a call, with the arguments of the op's reference."""
    import inspect

    parameters = ", ".join(
        str(p.replace(annotation=inspect.Parameter.empty))
        if p.kind != p.KEYWORD_ONLY
        else f"{p.name}=None"
        for p in inspect.signature(reference).parameters.values()
        if p.kind != p.KEYWORD_ONLY
    )
    return (
        "To add one:\n"
        f'    @sl.kernel("{op}", requires=lambda facts: None if facts.device == "{facts.device}" '
        f'else "only on {facts.device}")\n'
        f"    def my_{op}({parameters}, **options):\n"
        f"        ...  # what {reference.__module__}:{reference.__name__} computes"
    )
