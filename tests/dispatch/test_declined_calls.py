"""Calls that a handler declines or has no parameter for: `sl.explain` says what the call does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sparse_layouts as sl


@pytest.fixture
def w() -> sl.BSRTensor:
    torch.manual_seed(0)
    return sl.bsr(torch.randn(32, 32), 16)


@pytest.fixture
def other() -> sl.BSRTensor:
    """Another pattern than w's."""
    return sl.bsr(torch.eye(32), 16)


def falls_back(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    with sl.fallback("error"):
        try:
            function(*args, **kwargs)
        except sl.DenseFallbackError:
            return True
    return False


Calls = dict[str, Callable[[Any, Any], tuple[Any, ...]]]
DECLINED: Calls = {
    "add": lambda w, v: (torch.add, w, v),
    "sub": lambda w, v: (torch.sub, w, v),
    "mul": lambda w, v: (torch.mul, w, v),
    "mul by infinity": lambda w, v: (torch.mul, w, float("inf")),
    "mul from the left": lambda w, v: (torch.mul, float("nan"), w),
    "mul larger": lambda w, v: (torch.mul, w, torch.ones(2, 32, 32)),
    "div by zero": lambda w, v: (torch.div, w, 0),
    "div by dense": lambda w, v: (torch.div, w, torch.ones(32, 32)),
    "norm of order 0": lambda w, v: (torch.norm, w, 0),
    "norm along": lambda w, v: (torch.norm, w, 2, 0),
    "matrix norm": lambda w, v: (torch.linalg.norm, w, 1),
    "sum of a mask": lambda w, v: (torch.sum, w.pattern),
    "sum along both": lambda w, v: (torch.sum, w, (0, 1)),
    "sum of integers": lambda w, v: (torch.sum, w.long(), 0),
    "dropout of a mask": lambda w, v: (F.dropout, w.pattern),
}
TAKEN: Calls = {
    "add": lambda w, v: (torch.add, w, w),
    "mul": lambda w, v: (torch.mul, w, 2),
    "mul dense": lambda w, v: (torch.mul, w, torch.ones(32, 1)),
    "mask times dense": lambda w, v: (torch.mul, w.pattern, torch.ones(2, 32, 32)),
    "div": lambda w, v: (torch.div, w, 2),
    "norm": lambda w, v: (torch.norm, w, 1),
    "linalg.norm": lambda w, v: (torch.linalg.norm, w),
    "sum": lambda w, v: (torch.sum, w),
    "dropout": lambda w, v: (F.dropout, w),
}


@pytest.mark.parametrize("name", DECLINED)
def test_explain_of_a_declined_call(name: str, w: sl.BSRTensor, other: sl.BSRTensor) -> None:
    call = DECLINED[name](w, other)
    assert sl.explain(*call).kernel == "dense fallback"
    assert falls_back(*call)


@pytest.mark.parametrize("name", TAKEN)
def test_explain_of_a_taken_call(name: str, w: sl.BSRTensor, other: sl.BSRTensor) -> None:
    call = TAKEN[name](w, other)
    assert sl.explain(*call).route is not None
    assert sl.explain(*call).kernel == ""
    assert not falls_back(*call)


@pytest.mark.parametrize("dim", [0, -1])
def test_explain_names_the_op_of_a_sum(dim: int, w: sl.BSRTensor) -> None:
    (plan,) = sl.explain(torch.sum, w, dim).ops
    assert plan.op == "block_matmul"
    assert sl.explain(torch.sum, w, dim).kernel == "cpu"


KEYWORDS: dict[str, Callable[[Any], Any]] = {
    "sum axis": lambda w: w.sum(axis=0),
    "sum keepdims": lambda w: torch.sum(w, axis=1, keepdims=True),
    "swapaxes": lambda w: torch.swapaxes(w, axis0=0, axis1=1),
    "swapdims": lambda w: torch.swapdims(w, dim0=0, dim1=1),
    "permute": lambda w: torch.permute(w, dims=(1, 0)),
    "Tensor.permute": lambda w: w.permute(dims=(1, 0)),
    "softmax": lambda w: torch.softmax(w + w * 0, dim=-1),
}
FALLS_BACK: dict[str, Callable[[Any], Any]] = {
    "rsub": lambda w: torch.rsub(w, other=torch.ones(32, 32)),
    "rsub alpha": lambda w: torch.rsub(w, torch.ones(32, 32), alpha=3),
    "matmul": lambda w: torch.matmul(w, torch.ones(32, 2), out=torch.empty(32, 2)),
    "mm": lambda w: torch.mm(w, torch.ones(32, 2), out=torch.empty(32, 2)),
    "mv": lambda w: torch.mv(w, torch.ones(32), out=torch.empty(32)),
    "mul": lambda w: torch.mul(w, 2, out=torch.empty(32, 32)),
    "add": lambda w: torch.add(w, w, out=torch.empty(32, 32)),
    "sum": lambda w: torch.sum(w, 0, out=torch.empty(32)),
    "norm": lambda w: torch.norm(w, 2, dim=0, out=torch.empty(32)),
    "log_softmax": lambda w: torch.log_softmax(w, 0, out=torch.empty(32, 32)),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_other_names_of_arguments(name: str, w: sl.BSRTensor) -> None:
    with sl.fallback("error"):
        found = KEYWORDS[name](w)
    torch.testing.assert_close(found.to_dense(), KEYWORDS[name](w.to_dense()))


@pytest.mark.parametrize("name", FALLS_BACK)
def test_arguments_without_a_parameter_fall_back(name: str, w: sl.BSRTensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning):
        found = FALLS_BACK[name](w)
    torch.testing.assert_close(found, FALLS_BACK[name](w.to_dense()))
