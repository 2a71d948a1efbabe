"""The comparison that judges all kernels, judged itself: right results pass, wrong ones are red."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import (
    Arithmetic,
    Measure,
    as_results,
    check_call,
    reference_of,
    zeros_by_definition,
)
from tests.kernels.cases import Call
from tests.kernels.ops import all_cases, dense_of, example_of, exported

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
by_op = pytest.mark.parametrize("op", sorted(all_cases()))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@functools.cache
def measured(op: str, dtype: torch.dtype) -> Measure:
    """What judges the results of :func:`example`."""
    return Measure(op, example(op, dtype)[0])


@functools.cache
def example(op: str, dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    """A call and what the op's reference returns for it; neither is to be changed."""
    case = next(c for c in all_cases()[op] if c.name == example_of(op))
    call = case.build(dtype, "cpu")
    return call, list(as_results(reference_of(op)(*call.args, **call.kwargs)))


@by_op
@by_dtype
def test_the_reference_passes(op: str, dtype: torch.dtype) -> None:
    call, results = example(op, dtype)
    check_call(op, call, tuple(results))
    measured(op, dtype).check(tuple(results))


@by_op
@by_dtype
def test_float32_accumulation_passes(op: str, dtype: torch.dtype) -> None:
    call, _ = example(op, dtype)
    work = torch.promote_types(dtype, torch.float32)
    check_call(op, call, dense_of(op)(Arithmetic(dtype, work), *call.args, **call.kwargs))


def one_percent_more(t: Tensor) -> None:
    t.mul_(1.01)


def largest_entry_negated(t: Tensor) -> None:
    t.view(-1)[t.abs().masked_fill(t.isinf(), 0.0).argmax()] *= -1


def one_nan(t: Tensor) -> None:
    t.view(-1)[t.numel() // 2] = math.nan


def first_half_forgotten(t: Tensor) -> None:
    t.view(-1)[: t.numel() // 2] = 0.0


def noise_of_bfloat16(t: Tensor) -> None:
    t.copy_(t.bfloat16() * (1 + 2**-8))


def hidden(op: str, dtype: torch.dtype, i: int, spoil: Callable[[Tensor], None]) -> bool:
    """Whether what is spoilt is less than what the op's own roundings explain."""
    small = spoil in (one_percent_more, noise_of_bfloat16)
    return small and i == 0 and dtype != torch.float64 and bool(exported("ROUNDED_TO", op))


WRONGS = [one_percent_more, largest_entry_negated, one_nan, first_half_forgotten, noise_of_bfloat16]


@by_op
@by_dtype
@pytest.mark.parametrize("spoil", WRONGS, ids=lambda spoil: spoil.__name__)
def test_a_wrong_result_is_red(
    op: str, dtype: torch.dtype, spoil: Callable[[Tensor], None]
) -> None:
    _, results = example(op, dtype)
    for i, right in enumerate(results):
        if spoil is noise_of_bfloat16 and right.dtype == torch.bfloat16:
            continue  # that is how far apart its numbers are
        if hidden(op, dtype, i, spoil):
            continue
        wrong = right.contiguous().clone()
        spoil(wrong)
        with pytest.raises(AssertionError, match=f"result {i}"):
            measured(op, dtype).check((*results[:i], wrong, *results[i + 1 :]))


def has_zeros(op: str) -> bool:
    """Whether anything in an op's results is zero by definition."""
    zeros = zeros_by_definition(op, example(op, torch.float32)[0])
    return any(where is not None for where in zeros)


def test_most_ops_have_zeros() -> None:
    assert sum(map(has_zeros, all_cases())) >= 6


@pytest.mark.parametrize("op", [op for op in sorted(all_cases()) if has_zeros(op)])
def test_what_is_zero_by_definition_is_checked(op: str) -> None:
    call, results = example(op, torch.float32)
    for i, zeros in enumerate(zeros_by_definition(op, call)):
        if zeros is None:
            continue
        where = zeros.expand_as(results[i])
        assert where.any(), "the example has no such entry"
        leaking = results[i].clone()
        leaking[where] = 1e-30
        with pytest.raises(AssertionError, match="0 by definition"):
            measured(op, torch.float32).check((*results[:i], leaking, *results[i + 1 :]))


def test_minus_infinity_is_checked() -> None:
    call, (out, lse) = example("block_attention", torch.float32)
    assert lse.isneginf().any()
    with pytest.raises(AssertionError, match="-inf is in the wrong place"):
        check_call("block_attention", call, (out, lse.masked_fill(lse.isneginf(), 0.0)))


def test_shape_and_dtype_are_checked() -> None:
    call, (out,) = example("block_matmul", torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        check_call("block_matmul", call, out[..., :-1])
    with pytest.raises(AssertionError, match=r"torch\.float64, not torch\.float32"):
        check_call("block_matmul", call, out.double())
    with pytest.raises(AssertionError, match="2 results, not 1"):
        check_call("block_matmul", call, (out, out))
