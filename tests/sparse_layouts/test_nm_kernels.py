"""Which kernel takes a product with an n:m layout, what is derived for it, and cuSPARSELt's row,
run with a stand-in for the library.
"""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch.kernel_table import Facts, Verdict, choose, verdicts
from sparse_layouts.kernels.nm_matmul import reference, semi_structured
from sparse_layouts.nm_packing import pack_positions, scatter_entries


@pytest.mark.parametrize(
    ("function", "dtype", "columns", "kernel"),
    [
        (lambda w, x: w @ x, torch.float32, 1, "cpu_mkl"),
        (lambda w, x: w @ x, torch.float32, 32, "cpu_mkl"),
        (lambda w, x: w @ x, torch.float32, 33, "cpu"),
        (lambda w, x: w @ x, torch.bfloat16, 1, "cpu_mkl"),
        (lambda w, x: w @ x, torch.float16, 40, "cpu"),
        (lambda w, x: F.linear(x.mT, w), torch.float32, 4, "cpu_mkl"),
        (lambda w, x: F.linear(x.mT[None].expand(20, -1, -1), w), torch.float32, 4, "cpu"),
        (lambda w, x: F.linear(x[:, 0], w), torch.float32, 40, "cpu_mkl"),
        (lambda w, x: x.mT @ w.mT, torch.float32, 4, "cpu_mkl"),
        (lambda w, x: x.new_ones(3, 8) @ w, torch.float32, 4, "cpu"),
        (lambda w, x: w.mT @ x.new_ones(8, 2), torch.float32, 4, "cpu"),
    ],
)
def test_the_kernel_follows_the_columns(
    function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, columns: int, kernel: str
) -> None:
    if kernel == "cpu_mkl" and not torch.backends.mkl.is_available():
        pytest.skip("this torch is built without MKL")
    w, x = sl.nm(torch.randn(8, 24, dtype=dtype), 2, 4), torch.randn(24, columns, dtype=dtype)
    with sl.trace() as steps:
        function(w, x)
    assert [(step.what, step.kernel) for step in steps] == [("nm_matmul", kernel)]


@pytest.mark.parametrize("columns", [1, 100])
def test_explain_says_what_runs(columns: int) -> None:
    w = sl.nm(torch.randn(8, 24), 2, 4).requires_grad_()
    x = torch.randn(24, columns, requires_grad=True)
    for function, args in {
        torch.matmul: (w, x),
        torch.mm: (x.mT, w.mT),
        F.linear: (x.mT[None].expand(2, -1, -1), w),
        torch.sparse.sampled_addmm: (w.pattern, torch.randn(8, 3, requires_grad=True), x[:3, :24]),
    }.items():
        if function is torch.sparse.sampled_addmm and columns < 24:
            continue
        explanation = sl.explain(function, *args)
        with sl.trace() as steps:
            function(*args).sum().backward()
        ran = [(step.what, step.kernel) for step in steps if "dense" not in step.kernel]
        planned = [
            (plan.op, next(v.kernel.name for v in plan.verdicts if v.chosen))
            for plan in explanation.ops
        ]
        assert sorted(ran[: len(planned)]) == sorted(planned), function


def on_gpu(**changes: object) -> Facts:
    usual: dict[str, object] = {
        "capability": (9, 0),
        "triton": (3, 6, 0),
        "n_of_m": (2, 4),
        "columns": 16384,
        "divisor": 64,
        "cusparselt": True,
    }
    return Facts(
        changes.pop("device", "cuda"), changes.pop("dtype", torch.bfloat16), **{**usual, **changes}
    )


def verdict_of(kernel: str, facts: Facts) -> Verdict:
    return next(v for v in verdicts("nm_matmul", facts) if v.kernel.name == kernel)


SEMI_STRUCTURED: dict[str, tuple[dict[str, object], str]] = {
    "n:m": ({"n_of_m": (1, 4)}, "takes 2:4, not 1:4"),
    "dtype": ({"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
    "transposed": ({"transposed": True}, "not its transpose"),
    "columns": ({"columns": 16}, "16384 or more columns of the dense operand, not 16"),
    "sizes": ({"divisor": 32}, "sizes 64 divides, here it is 32"),
    "capability": ({"capability": (7, 5)}, "capability 8.0 or newer, found 7.5"),
    "library": ({"cusparselt": False}, "needs cuSPARSELt"),
}


def test_semi_structured_is_chosen_for_wide_operands() -> None:
    assert choose("nm_matmul", on_gpu()).name == "semi_structured"
    assert choose("nm_matmul", on_gpu(columns=512)).name == "triton_expand"


def test_which_columns_are_expanded_in_scratch_memory() -> None:
    for columns, transposed in itertools.product((1, 16, 32, 8192), (False, True)):
        own = on_gpu(columns=columns, transposed=transposed, n_of_m=(1, 4))
        expected = "triton" if columns < 32 else "triton_expand"
        assert choose("nm_matmul", own).name == expected
    reason = verdict_of("triton_expand", on_gpu(columns=16)).reason
    assert reason == (
        "expands the matrix in scratch memory, for 32 or more columns of the dense operand, not 16"
    )
    assert choose("nm_sddmm", on_gpu()).name == "triton_dense"


@pytest.mark.parametrize("name", SEMI_STRUCTURED)
def test_why_semi_structured_cannot(name: str) -> None:
    changes, message = SEMI_STRUCTURED[name]
    assert message in str(verdict_of("semi_structured", on_gpu(**changes)).reason)


BY_FRAGMENTS: dict[str, tuple[dict[str, object], str]] = {
    "n:m": ({"n_of_m": (3, 4)}, "takes 2:4, 1:4, 2:8 and 1:8, not 3:4"),
    "device": ({"device": "cpu"}, "works on cuda tensors, these are on cpu"),
    "capability": ({"capability": (10, 0)}, "for compute capability 9.0 .*, found 10.0"),
    "dtype": ({"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
    "transposed": ({"transposed": True}, "not its transpose"),
    "columns": ({"columns": 128}, "up to 64 columns of the dense operand, not 128"),
    "sizes": ({"fragments": False}, "whose rows 16 and whose columns 64 divides"),
    "order": ({"order": "rows"}, r"call w.prepack\(\) once"),
}


@pytest.mark.parametrize("name", BY_FRAGMENTS)
def test_why_fragments_are_not_multiplied(name: str) -> None:
    usual: dict[str, object] = {"order": "fragments", "fragments": True, "columns": 8}
    assert choose("nm_matmul", on_gpu(**usual)).name == "fragments"
    changes, message = BY_FRAGMENTS[name]
    assert re.search(message, str(verdict_of("fragments", on_gpu(**{**usual, **changes})).reason))


def test_no_other_kernel_takes_fragments() -> None:
    for verdict in verdicts("nm_matmul", on_gpu(order="fragments"))[2:]:
        assert verdict.reason == "takes entries that lie row by row, not by fragments"


@pytest.fixture
def stand_in_for_cusparselt(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """cuSPARSELt's two functions in plain torch, as strict as they are; lists the calls."""
    calls: list[str] = []

    def compress(dense: Tensor) -> Tensor:
        calls.append("compress")
        groups = dense.unflatten(-1, (-1, 4))
        places = (groups != 0).int().argsort(stable=True, dim=-1, descending=True)[..., :2]
        places = places.sort(-1)[0]
        metadata = pack_positions(places.flatten(-2), 4).view(torch.int16).view(dense.dtype)
        return torch.cat([groups.gather(-1, places).flatten(), metadata.flatten()])

    def multiply(compressed: Tensor, x: Tensor, *, transpose_result: bool) -> Tensor:
        calls.append("multiply")
        assert x.is_contiguous() or x.mT.is_contiguous()
        assert x.shape[1] % 8 == 0
        columns = x.shape[0]
        rows = compressed.numel() * 16 // 9 // columns
        values, metadata = compressed.split(
            [rows * columns // 2, compressed.numel() - rows * columns // 2]
        )
        words = metadata.view(torch.int16).view(rows, -1).view(torch.int32)
        dense = scatter_entries(values.view(rows, -1), words, 2, 4, columns)
        out = (dense.float() @ x.float()).to(x.dtype)
        return out.mT.contiguous() if transpose_result else out

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    probe = semi_structured._values_come_first
    probe.cache_clear()
    yield calls
    probe.cache_clear()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("columns", [64, 61])
@pytest.mark.parametrize(("batch", "own", "patterns"), [(1, 1, 1), (3, 1, 2), (2, 2, 1), (0, 1, 1)])
def test_semi_structured(
    flip: bool,
    columns: int,
    batch: int,
    own: int,
    patterns: int,
    stand_in_for_cusparselt: list[str],
) -> None:
    w = sl.nm(torch.randn(patterns, 64, 128), 2, 4)
    values = torch.randn(own, patterns, 64, 64).bfloat16()
    values[..., ::5] = 0  # stored, and zero
    x = torch.randn(batch, patterns, columns, 128).bfloat16().mT
    options = {"n": 2, "m": 4, "transposed_output": flip}
    for _ in range(2):
        found = semi_structured.nm_matmul(values, w.inner_indices, x, **options)
        expected = reference.nm_matmul(values, w.inner_indices, x, **options)
        assert torch.equal(found, expected)
        assert (found.mT if flip else found)[:1].is_contiguous()
        values.mul_(2)  # the next product is of the new values
    made = stand_in_for_cusparselt.count("compress")
    assert made == (1 + patterns if batch else 0)  # the probe, and each pattern once


def test_semi_structured_where_values_lie_elsewhere(
    stand_in_for_cusparselt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi_structured, "_values_come_first", lambda *_: False)
    w = sl.nm(torch.randn(1, 64, 64).bfloat16(), 2, 4)
    x = torch.randn(1, 1, 64, 8).bfloat16()
    parts = (w.inner_values[None], w.inner_indices, x)
    found = semi_structured.nm_matmul(*parts, n=2, m=4)
    assert torch.equal(found, reference.nm_matmul(*parts, n=2, m=4))
    assert stand_in_for_cusparselt == ["compress", "multiply"]


def test_what_is_derived_is_counted_and_dropped() -> None:
    w = sl.nm(torch.randn(8, 24), 2, 4)
    x = torch.randn(24, 2)
    assert w.cached_bytes == 0
    before = w @ x
    assert w.cached_bytes == 4 * w.nnz
    assert w.mT.cached_bytes == w.cached_bytes
    w.mul_(2)
    assert torch.equal(w @ x, 2 * before)  # values are never kept
    gone = weakref.ref(w.inner_indices)
    del w
    gc.collect()
    assert gone() is None
