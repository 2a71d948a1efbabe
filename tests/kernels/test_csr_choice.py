"""Which kernel of csr_matmul the table chooses on a GPU, and why cuSPARSE is not it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.dispatch import Facts, choose, verdicts
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.csr_matmul import facts

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def on_gpu(**changes: object) -> Facts:
    usual: dict[str, object] = {
        "capability": (9, 0),
        "triton": (3, 6, 0),
        "columns": 512,
        "row_entries": 64,
    }
    return Facts("cuda", changes.pop("dtype", HALF), **{**usual, **changes})


@pytest.mark.parametrize("dtype", [HALF, torch.float16, SINGLE], ids=str)
@pytest.mark.parametrize("columns", [128, 4096])
@pytest.mark.parametrize("row_entries", [0, 1, 64])
def test_cusparse_takes_short_rows_times_many_columns(
    dtype: torch.dtype, columns: int, row_entries: int
) -> None:
    found = on_gpu(dtype=dtype, columns=columns, row_entries=row_entries)
    assert choose("csr_matmul", found).name == "cusparse"


WHY_NOT: dict[str, tuple[dict[str, object], str]] = {
    "one column": ({"columns": 1}, "from 128 columns of the dense operand, not with 1"),
    "columns": ({"columns": 64}, "from 128 columns of the dense operand, not with 64"),
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


@pytest.mark.parametrize("changes", [{"triton": ()}, {"capability": (7, 5), "dtype": SINGLE}])
@pytest.mark.parametrize("name", WHY_NOT)
def test_cusparse_takes_everything_that_triton_cannot(
    name: str, changes: dict[str, object]
) -> None:
    found = on_gpu(**{**WHY_NOT[name][0], **changes})
    assert requirements.triton_csr(found) is not None
    assert choose("csr_matmul", found).name == "cusparse"


def test_cusparse_cannot() -> None:
    found = {
        "device": Facts("cpu", SINGLE),
        "dtype": on_gpu(dtype=torch.float8_e5m2),
        "capability": on_gpu(capability=(7, 5)),
    }
    reasons = [str(requirements.cusparse_csr(f)) for f in found.values()]
    for reason, part in zip(reasons, ("cuda tensors", "not torch.float8_e5m2", "found 7.5")):
        assert part in reason


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
    explanation = str(sl.explain(torch.matmul, sl.csr(torch.eye(4)), torch.ones(4, 3)))
    assert "cusparse" in explanation


@pytest.mark.parametrize("make", [sl.csr, sl.csc])
def test_explain_knows_of_transposes(make: object) -> None:
    w = make(torch.ones(4, 8)).requires_grad_()  # type: ignore[operator]
    x = torch.ones(8, 3, requires_grad=True)
    uses = {use.what: use.facts for use in sl.explain(torch.matmul, w, x).ops}  # type: ignore[attr-defined]
    assert [f.transposed for f in uses.values()] is not None
