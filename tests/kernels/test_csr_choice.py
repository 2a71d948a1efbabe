"""Which kernel of csr_matmul the table chooses on a GPU, and why cuSPARSE is not it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch import Facts, choose
from sparse_layouts.dispatch.kernel_table import KERNELS, verdicts
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.csr_matmul import facts

SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def on_gpu(**changes: Any) -> Facts:
    usual: dict[str, Any] = {
        "capability": (9, 0),
        "triton": (3, 6, 0),
        "columns": 256,
        "row_entries": 64,
    }
    return Facts("cuda", changes.pop("dtype", SINGLE), **{**usual, **changes})


def chosen(found: Facts) -> str:
    row = choose("csr_matmul", found)
    assert row is not None
    return row.name


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("row_entries", [0, 1, 64])
def test_cusparse_takes_short_rows_times_some_columns(columns: int, row_entries: int) -> None:
    assert chosen(on_gpu(columns=columns, row_entries=row_entries)) == "cusparse"


WHY_NOT: dict[str, tuple[dict[str, Any], str]] = {
    "one column": ({"columns": 1}, "from 128 to 256 columns of the dense operand, not with 1"),
    "few columns": ({"columns": 64}, "to 256 columns of the dense operand, not with 64"),
    "many columns": ({"columns": 512}, "to 256 columns of the dense operand, not with 512"),
    "long rows": ({"row_entries": 128}, "up to 64 entries a row, not with 128"),
    "transposed": ({"transposed": True}, "not with its transpose"),
    "double": ({"dtype": DOUBLE}, "not in torch.float64"),
    "deterministic": ({"deterministic": True}, "promises no order of sums"),
}


@pytest.mark.parametrize("name", WHY_NOT)
def test_else_triton_takes_it(name: str) -> None:
    changes, message = WHY_NOT[name]
    answers = {v.kernel.name: v for v in verdicts("csr_matmul", on_gpu(**changes))}
    assert message in str(answers["cusparse"].reason)
    assert answers["triton"].chosen


@pytest.mark.parametrize("changes", [{"triton": ()}, {"capability": (7, 5)}])
@pytest.mark.parametrize("name", WHY_NOT)
def test_cusparse_takes_everything_that_triton_cannot(name: str, changes: dict[str, Any]) -> None:
    found = on_gpu(**{**WHY_NOT[name][0], **changes})
    assert requirements.triton_floats(found) is not None
    assert chosen(found) == "cusparse"


CANNOT: dict[str, tuple[Facts, str]] = {
    "device": (Facts("cpu", SINGLE), "works on cuda tensors"),
    "dtype": (on_gpu(dtype=torch.float8_e5m2), "not torch.float8_e5m2"),
    "16 bits": (on_gpu(dtype=torch.bfloat16), "not torch.bfloat16: in 16 bits it is inexact"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_cusparse_cannot(name: str) -> None:
    found, message = CANNOT[name]
    assert message in str(requirements.cusparse_csr(found))


@pytest.mark.parametrize(
    ("entries", "shape", "transposed", "expected"),
    [
        (0, (4, 8), False, 0),
        (5, (0, 8), False, 8),
        (4, (4, 8), False, 1),
        (5, (4, 8), False, 2),
        (17, (4, 8), False, 8),
        (17, (4, 8), True, 4),
    ],
)
def test_the_mean_row_of_the_result(
    entries: int, shape: tuple[int, int], transposed: bool, expected: int
) -> None:
    found = facts(torch.ones(1, entries), 3, entries, shape, transposed)
    assert (found.row_entries, found.columns, found.transposed) == (expected, 4, transposed)
    assert facts(torch.ones(1, 0), 0, 0, shape, transposed).columns == 0


def test_deterministic_algorithms_are_a_fact(deterministic: None) -> None:
    assert facts(torch.ones(1, 4), 3, 4, (4, 8), False).deterministic
    torch.use_deterministic_algorithms(False)
    assert not facts(torch.ones(1, 4), 3, 4, (4, 8), False).deterministic


@pytest.fixture
def asked() -> Iterator[list[Facts]]:
    """The facts that the table is asked about csr_matmul."""
    seen: list[Facts] = []

    def listens(found: Facts) -> str:
        seen.append(found)
        return "only listens"

    @sl.kernel("csr_matmul", requires=listens)
    def listener() -> None: ...

    yield seen
    listener.unregister()  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [sl.csr, sl.csc])
@pytest.mark.parametrize("call", ["w @ x", "x @ w", "linear", "sddmm"])
def test_explain_asks_what_the_call_asks(
    call: str, make: Callable[[Tensor], Any], asked: list[Facts]
) -> None:
    w = make(torch.ones(4, 64))
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(64, 3, requires_grad=True)
    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "w @ x": (torch.matmul, (w, b)),
        "x @ w": (torch.matmul, (a, w)),
        "linear": (torch.nn.functional.linear, (b.mT, w)),
        "sddmm": (sl.sddmm, (a.mT, b.mT, w.pattern)),
    }
    function, args = cases[call]

    def told(call: Callable[[], Any]) -> set[Facts]:
        asked.clear()
        KERNELS.chosen.clear()  # a choice made before asks nobody
        call()
        return set(asked)

    with torch.no_grad():  # the product alone
        alone = told(lambda: function(*args))
        assert alone == told(lambda: sl.explain(function, *args))
    assert len(alone) == (call != "sddmm")
    assert told(lambda: function(*args).sum().backward()) == told(
        lambda: sl.explain(function, *args)
    )
    assert {(f.transposed, f.row_entries) for f in asked} == {
        (make is not sl.csr, 64),
        (make is sl.csr, 4),
    }
