"""CSR and CSC layouts at work: training, compiled code, real matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.io
import scipy.sparse
import torch
from torch import Tensor, nn

import sparse_layouts as sl
from tests.sparse_layouts.stand_ins import banded, power_law

Make = Callable[..., Any]
Check = Callable[..., None]

BOTH = pytest.mark.parametrize("make", [sl.csr, sl.csc])
F64 = torch.float64
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def dense() -> Tensor:
    """float64 (6, 9) with an empty row and an empty column."""
    made = torch.randn(6, 9, dtype=F64) * (torch.rand(6, 9) < 0.5)
    made[3] = made[:, 4] = 0
    return made


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


# --- training and compiled code -------------------------------------------------------------------


def model_of(weight: Any) -> nn.Linear:
    model = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    model.weight = nn.Parameter(weight)
    return model


@BOTH
def test_training_equals_dense_on_the_stored_entries(
    make: Make, dense: Tensor, assert_close: Check
) -> None:
    sparse, plain = model_of(make(dense)), model_of(dense.clone())
    plain.bias.data.copy_(sparse.bias.data)
    stored = (dense != 0).double()
    optimizers = [torch.optim.AdamW(m.parameters(), 0.1) for m in (sparse, plain)]
    for _ in range(5):
        x = normal(7, 9)
        for model, optimizer in zip((sparse, plain), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if model is plain:
                plain.weight.grad.mul_(stored)
            optimizer.step()
    assert_close(sparse.weight.detach(), plain.weight.detach() * stored, scale=100.0)


@BOTH
def test_compiled_linear_forward_and_backward(
    make: Make, dense: Tensor, assert_close: Check
) -> None:
    model = model_of(make(dense))
    x = normal(7, 9).requires_grad_()
    out = model(x)
    out.square().sum().backward()
    expected = [out.detach(), x.grad, model.weight.grad.to_dense(), model.bias.grad]
    x.grad = None
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    out.square().sum().backward()
    assert type(model.weight.grad) is type(model.weight.data)
    got = [out.detach(), x.grad, model.weight.grad.to_dense(), model.bias.grad]
    for mine, its in zip(got, expected, strict=True):
        assert_close(mine, its)


@BOTH
def test_compiled_attention(make: Make, assert_close: Check) -> None:
    mask = make((torch.rand(12, 16) < 0.4).double()).pattern

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(sl.sddmm(q, k.mT, mask), -1) @ v

    operands = [normal(2, n, 4).requires_grad_() for n in (12, 16, 16)]
    twins = [t.detach().clone().requires_grad_() for t in operands]
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*operands)
    expected = attend(*twins)
    assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for one, twin in zip(operands, twins, strict=True):
        assert_close(one.grad, twin.grad)


# --- matrices as they are -------------------------------------------------------------------------

FILES = sorted(DATA.rglob("*.smtx")) + sorted(DATA.rglob("*.mtx"))
REAL = [pytest.param(path, id=path.stem) for path in FILES] or [
    pytest.param(None, marks=pytest.mark.skip(reason=f"no real matrices in {DATA}"))
]


def check_matrix(w: Any, reference: scipy.sparse.csr_array, columns: int) -> None:
    """Products of both kinds and their gradients against scipy's, in float64."""
    x, g = normal(w.shape[1], columns), normal(w.shape[0], columns)
    x.requires_grad_()
    w.requires_grad_()
    out = w @ x
    out.backward(g)
    for got, expected in (
        (out.detach(), reference @ x.detach().numpy()),
        (x.grad, reference.T @ g.numpy()),
    ):
        exact = torch.from_numpy(expected)
        eps = torch.finfo(F64).eps
        torch.testing.assert_close(got, exact, rtol=0, atol=8 * eps * float(exact.norm()))
    rows, cols = w.grad.coordinates()
    scores = (g[rows] * x.detach()[cols]).sum(1)
    eps = torch.finfo(F64).eps
    torch.testing.assert_close(
        w.grad.values(), scores, rtol=0, atol=8 * eps * float(scores.norm()) * math.sqrt(columns)
    )


@pytest.mark.parametrize("path", REAL)
@BOTH
def test_real_matrices(make: Make, path: Path) -> None:
    if path.suffix == ".smtx":
        pattern = sl.load_smtx(path, dtype=F64)
        w = pattern.like_self(torch.randn_like(pattern.values()))
    else:
        w = sl.csr(scipy.sparse.csr_array(scipy.io.mmread(path)).astype(float))
    reference = w.to_scipy().copy()
    check_matrix(make(w), reference, 40)


@pytest.mark.parametrize("columns", [1, 40])
@pytest.mark.parametrize("kind", ["power law", "banded"])
@BOTH
def test_stand_ins(make: Make, kind: str, columns: int) -> None:
    source = banded(500, 4) if kind == "banded" else power_law(600, 400, 8000)
    check_matrix(make(source), source.copy(), columns)
