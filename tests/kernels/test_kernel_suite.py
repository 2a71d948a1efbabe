"""Every row of the kernel table against its op's reference in float64, by discovery.

CPU rows run in any process. Triton rows run in its interpreter on CPU tensors (fp32 and fp16: it
computes bf16 wrongly, and rounds to e4m3 without the carry, 7.9 to 4) and, with every dtype, on the
GPU. A row takes a case where its `requires` holds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch import Facts, Kernel
from sparse_layouts.dispatch.kernel_table import KERNELS
from tests.conftest import HAS_TRITON
from tests.kernels.accuracy import as_results, check_call, reference_of
from tests.kernels.cases import Call, Case
from tests.kernels.ops import all_cases, families

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTERPRETED_DTYPES = (torch.float32, torch.float16)
CAPABILITIES = ((8, 0), (9, 0), (10, 0))
# numpy warns where a GPU computes on, by IEEE's rules; the results are checked
AS_ON_A_GPU = "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"
MARKS = {
    "cpu": (),
    "interpreter": (pytest.mark.interpreter, pytest.mark.filterwarnings(AS_ON_A_GPU)),
    "gpu": (pytest.mark.gpu,),
}


# those of every op that are run several times, for equal bits
REPEATED = {
    "block64",
    "hopper_64",
    "hopper_power",
    "partial_counts",
    "power_law",
    "power_law_64",
    "even_power_law",
    "even_long_row",
    "one_kv_head",
    "bias_by_sample",
    "everything",
    "packed_64",
    "packed_everything",
}.union(*(family.EXAMPLES.values() for family in families()))


def rows() -> list[Kernel]:
    """The rows of every op."""
    assert sl.table()
    return [row for of_op in KERNELS.rows.values() for row in of_op]


def is_triton(row: Kernel) -> bool:
    """Whether the interpreter can run it; Gluon (`hopper_*.py`) it cannot."""
    return row.source.partition(":")[0].rpartition(".")[2].startswith("triton_")


def facts_on_gpus(case: Case, dtype: torch.dtype) -> list[Facts]:
    """The facts of a case on every architecture that kernels are compiled for."""
    facts = case.facts(dtype, "cpu")
    triton = facts.triton or (3, 6, 0)
    on_gpu = facts._replace(device="cuda", triton=triton, cusparselt=True)
    return [on_gpu._replace(capability=c) for c in CAPABILITIES]


def runs_in(row: Kernel, case: Case, dtype: torch.dtype) -> Iterator[str]:
    """The modes in which a row is tested with a case."""
    if row.requires(case.facts(dtype, "cpu")) is None:
        yield "cpu"
    if any(row.requires(facts) is None for facts in facts_on_gpus(case, dtype)):
        yield "gpu"
        if is_triton(row) and case.small and dtype in INTERPRETED_DTYPES:
            yield "interpreter"


@functools.cache
def every_run() -> tuple[tuple[Kernel, Case, torch.dtype, str], ...]:
    """Rows, cases, dtypes and modes."""
    return tuple(
        (row, case, dtype, mode)
        for row in rows()
        for case in all_cases().get(row.op, [])
        for dtype in DTYPES
        for mode in runs_in(row, case, dtype)
    )


def parametrized(*names: str) -> pytest.MarkDecorator:
    """Over every run, or over those whose case is named."""
    runs = [
        pytest.param(
            row,
            case,
            dtype,
            "cuda" if mode == "gpu" else "cpu",
            marks=MARKS[mode],
            id=f"{row.op}-{row.name}-{mode}-{case.name}-{str(dtype).removeprefix('torch.')}",
        )
        for row, case, dtype, mode in every_run()
        if not names or (case.name in names and mode != "interpreter")
    ]
    return pytest.mark.parametrize(("row", "case", "dtype", "device"), runs)


def build(row: Kernel, case: Case, dtype: torch.dtype, device: str) -> Call:
    """The case's call; skips where this machine's GPU is not one that the row takes."""
    if device == "cuda":
        reason = row.requires(case.facts(dtype, device))
        if reason is not None:
            pytest.skip(f"{row.op}/{row.name}: {reason}")
    call = case.build(dtype, device)
    if is_triton(row) and device == "cpu":  # in the interpreter
        call = call.map(lambda t: t.float() if t.element_size() == 1 else t)
    return call


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two results are equal to the last bit, NaN included."""
    if a is None or b is None:
        return a is b
    if a.dtype.is_floating_point:
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.contiguous().view(integer), b.contiguous().view(integer)
    return torch.equal(a, b)


@parametrized()
def test_kernel_equals_reference(
    row: Kernel, case: Case, dtype: torch.dtype, device: str, poisoned_empty: None
) -> None:
    call = build(row, case, dtype, device)
    before = [t.clone() for t in call.tensors]
    returned = row.function(*call.args, **call.kwargs)
    changed = [
        tuple(t.shape) for t, old in zip(call.tensors, before, strict=True) if not same_bits(t, old)
    ]
    assert not changed, f"the kernel wrote to inputs of shape {changed}"
    check_call(row.op, call, returned)


@parametrized(*REPEATED)
def test_same_inputs_give_same_bits(
    row: Kernel, case: Case, dtype: torch.dtype, device: str, poisoned_empty: None
) -> None:
    call = build(row, case, dtype, device)
    first = as_results(row.function(*call.args, **call.kwargs))
    for _ in range(3):
        again = as_results(row.function(*call.args, **call.kwargs))
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("op", sorted(KERNELS.rows))
def test_every_op_has_cases_and_a_reference(op: str) -> None:
    cases = all_cases().get(op)
    assert cases, f"no tests/kernels/cases*.py has cases for {op}: add them to its OPS"
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    assert callable(reference_of(op))


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.op}-{row.name}")
def test_every_row_is_run(row: Kernel) -> None:
    modes = {mode for which, _, _, mode in every_run() if which is row}
    assert modes, f"no case of {row.op} meets what {row.name} requires: nothing would test it"
    if is_triton(row):
        assert modes >= {"gpu", "interpreter"}, modes


def kernel_that_forgets(call: Call, op: str) -> Any:
    """The reference, with one stored entry of the first result left unwritten."""
    first, *rest = as_results(reference_of(op)(*call.args, **call.kwargs))
    assert first is not None
    unwritten = torch.empty_like(first)
    unwritten.flatten()[1:] = first.flatten()[1:]
    return (unwritten, *rest) if rest else unwritten


@pytest.mark.parametrize("op", sorted(all_cases()))
def test_the_comparison_sees_an_unwritten_entry(op: str, poisoned_empty: None) -> None:
    call = all_cases()[op][0].build(torch.float32, "cpu")
    check_call(op, call, reference_of(op)(*call.args, **call.kwargs))
    with pytest.raises(AssertionError, match=r"1 of .* NaN"):
        check_call(op, call, kernel_that_forgets(call, op))


def test_triton_is_there_on_linux() -> None:
    import sys

    assert HAS_TRITON or sys.platform != "linux"
