"""Sparsifiers: the protocol, in chunks and at once; sparsifiers of one's own; errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from tests.sparse_layouts.sparsifier_cases import (
    ALL,
    BY_ROWS,
    DTYPES,
    numbers,
    size_of,
)


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("rows", [None, 6, 12, 24, 600])
def test_chunks_are_what_keep_keeps(name: str, rows: int | None) -> None:
    dense, make = numbers(3, 12, 16), BY_ROWS[name]
    torch.manual_seed(1)
    sparsifier = make()
    kept = sparsifier.keep(dense)
    torch.manual_seed(1)
    again = make().chunks(dense, rows=rows) if rows else make().chunks(dense, chunk_bytes=1)
    firsts, parts = zip(*again, strict=True)
    assert torch.equal(torch.cat(parts).view(dense.shape), kept)
    step = rows or sparsifier.row_multiple
    assert list(firsts) == list(range(0, 36, step))
    assert 0 < kept.sum() < kept.numel() or name == "all"


def test_chunks_end_between_blocks() -> None:
    dense = torch.randn(960, 512)  # 256 rows would be a chunk: no multiple of 48
    keep = sl.Blockwise(sl.Threshold(55.0), (48, 64))
    kept = torch.linalg.vector_norm(dense.view(20, 48, 8, 64), dim=(1, 3)) > 55.0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(keep.keep(dense), kept.repeat_interleave(48, 0).repeat_interleave(64, 1))
    assert torch.equal(sl.Threshold(55.0).keep_blocks(dense, (48, 64)), kept)
    parts = list(keep.chunks(dense))
    assert len(parts) > 1
    assert all(part.shape[0] % 48 == 0 for _, part in parts)


@pytest.mark.parametrize("name", BY_ROWS)
def test_chunks_of_rows_that_no_view_joins(name: str) -> None:
    torch.manual_seed(1)
    apart = numbers(12, 3, 16).transpose(0, 1)
    sparsifier = BY_ROWS[name]()
    first_rows = 0
    torch.manual_seed(1)
    for first, kept in sparsifier.chunks(apart, rows=6):
        assert first == first_rows
        first_rows += kept.shape[0]
    assert first_rows == 36


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("view", ["transposed", "every second", "heads apart", "negative zero"])
def test_strides_do_not_matter(name: str, view: str) -> None:
    if view == "transposed":
        dense = numbers(3, 16, 12).mT
    elif view == "every second":
        dense = numbers(3, 24, 32)[:, ::2, ::2]
    elif view == "heads apart":
        dense = numbers(12, 3, 16).transpose(0, 1)
    else:
        dense = -numbers(3, 12, 16)
    torch.manual_seed(1)
    kept = ALL[name]().keep(dense)
    torch.manual_seed(1)
    same = ALL[name]().keep((dense + 0).contiguous())
    assert torch.equal(kept, same)


@pytest.mark.parametrize("name", ["magnitude", "threshold", "random", "all"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 4), (3, 0), (2, 0, 4), (0, 3, 4), (1, 1)])
def test_any_shape_of_entries(name: str, shape: tuple[int, ...]) -> None:
    kept = ALL[name]().keep(numbers(*shape))
    assert kept.dtype == torch.bool
    assert kept.shape == shape
    if ALL[name]().scope != "materialising" and len(shape) >= 2:
        found = [part for _, part in ALL[name]().chunks(numbers(*shape))]
        assert sum(part.shape[0] for part in found) == math.prod(shape[:-1])


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_nothing(name: str) -> None:
    if "same" in name:
        pytest.skip("a pattern has a shape of its own")
    kept = ALL[name]().keep(torch.zeros(0, 12, 16))
    assert kept.shape == (0, 12, 16)
    bm, bn = getattr(ALL[name](), "block_size", (3, 4))
    assert sl.bsr(torch.zeros(0, 12, 16), (bm, bn), keep=ALL[name]()).shape == (0, 12, 16)


@pytest.mark.parametrize("name", [*ALL, "magnitude of blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_chooses_as_float64_does(name: str, dtype: torch.dtype) -> None:
    dense = numbers(3, 12, 16, dtype=dtype)
    if name == "magnitude of blocks":
        # sums of squares of eighths are exact in float32: ties stay ties
        kept = sl.Magnitude(0.3).keep_blocks(dense, (4, 2))
        assert torch.equal(kept, sl.Magnitude(0.3).keep_blocks(size_of(dense), (4, 2)))
        return
    torch.manual_seed(1)
    kept = ALL[name]().keep(dense)
    torch.manual_seed(1)
    assert torch.equal(kept, ALL[name]().keep(size_of(dense)))


def test_the_smallest_integer_is_the_largest_magnitude() -> None:
    assert sl.Magnitude(0.5).keep(torch.tensor([-128, 127], dtype=torch.int8)).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("name", [name for name, make in ALL.items() if make().reads_values])
def test_nan_raises_where_values_are_compared(name: str) -> None:
    dense, sparsifier = numbers(12, 16), ALL[name]()
    dense[7, 3] = math.nan
    with pytest.raises(ValueError, match=r"got 1 NaN.*nan_to_num.*SamePattern"):
        sparsifier.keep(dense)
    block = getattr(sparsifier, "block_size", (3, 4))
    with pytest.raises(ValueError, match="got 1 NaN"):
        sl.bsr(dense, block, keep=sparsifier)


def test_infinity_is_the_largest() -> None:
    dense = torch.tensor([[1.0, -math.inf, 2.0, math.inf]])
    for keep in (sl.Magnitude(0.5), sl.NM(2, 4), sl.Threshold(2.0)):
        assert keep.keep(dense).tolist() == [[False, True, False, True]]
    assert not sl.Threshold(math.inf).keep(dense).any()
    assert sl.Magnitude(0.25).keep_blocks(dense, (1, 1)).tolist() == [[False, True, False, False]]


def test_values_that_nobody_reads_may_be_nan() -> None:
    dense = torch.full((8, 8), math.nan)
    for keep in (sl.KeepAll(), sl.Random(1.0), sl.SamePattern(torch.ones(8, 8, dtype=torch.bool))):
        assert keep.keep(dense).all()
        assert sl.bsr(dense, 4, keep=keep).values().isnan().all()


# --- one's own ------------------------------------------------------------------------------------


class Alternate(sl.Sparsifier):
    """Every second column."""

    scope = "streaming"
    reads_values = False

    def choose(self, magnitudes: Tensor) -> Tensor:
        columns = torch.arange(magnitudes.shape[-1], device=magnitudes.device)
        return (columns % 2 == 0).expand(magnitudes.shape)


class Mean:
    """Of no class of ours."""

    def choose(self, magnitudes: Tensor) -> Tensor:
        return magnitudes > magnitudes.mean()


def test_a_sparsifier_of_ones_own() -> None:
    dense = numbers(6, 8)
    dense[0, 0] = math.nan
    kept = Alternate().keep(dense)
    assert torch.equal(kept, (torch.arange(8) % 2 == 0).expand(6, 8))
    parts = [part for _, part in Alternate().chunks(dense, rows=2)]
    assert torch.equal(torch.cat(parts), kept)
    blocks = sl.Blockwise(Alternate(), 2)
    assert blocks.scope == "blocking"
    assert torch.equal(sl.bsr(dense, 2, keep=blocks).crow_indices(), torch.tensor([0, 2, 4, 6]))


def test_an_object_that_chooses_will_do() -> None:
    dense = torch.zeros(8, 8)
    dense[:4, :4] = 1
    assert sl.bsr(dense, 4, keep=Mean()).density == 0.25
    assert sl.Blockwise(Mean(), 4).keep(dense).sum() == 16
    dense[0, 0] = math.nan
    with pytest.raises(ValueError, match="Mean: expected numbers to compare, got 1 NaN"):
        sl.bsr(dense, 4, keep=Mean())


def chooses(result: Callable[[Tensor], object]) -> sl.Sparsifier:
    class Wrong(sl.Sparsifier):
        scope = "streaming"

        def choose(self, magnitudes: Tensor) -> Tensor:
            return result(magnitudes)  # type: ignore[return-value]

    return Wrong()


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda x: x, TypeError, r"Wrong: choose returns a bool tensor.*got torch\.float32"),
        (lambda x: True, TypeError, r"Wrong: choose returns a bool tensor.*got True"),
        (lambda x: x.flatten() > 0, ValueError, r"shape \(\d, \d\) on cpu, got \(\d+,\) on cpu"),
        (lambda x: (x > 0).to("meta"), ValueError, "on cpu, got .* on meta"),
    ],
)
def test_a_wrong_choice_raises(
    result: Callable[[Tensor], object], error: type[Exception], match: str
) -> None:
    dense = torch.ones(8, 8)
    for use in (
        lambda keep: keep.keep(dense),
        lambda keep: list(keep.chunks(dense)),
        lambda keep: keep.keep_blocks(dense, (2, 2)),
        lambda keep: sl.Blockwise(keep, 2).keep(dense),
        lambda keep: list(sl.Blockwise(keep, 2).chunks(dense)),
        lambda keep: sl.Blockwise(keep, 2).choose(dense),
        lambda keep: sl.bsr(dense, 2, keep=keep),
        lambda keep: sl.sparsify_globally([dense], keep),
    ):
        with pytest.raises(error, match=match):
            use(chooses(result))


# --- bad input ------------------------------------------------------------------------------------

BAD_SPARSIFIERS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "magnitude 1.5": (lambda: sl.Magnitude(1.5), ValueError, "between 0 and 1, got 1.5"),
    "magnitude -1": (lambda: sl.Magnitude(-1), ValueError, "between 0 and 1, got -1"),
    "magnitude str": (lambda: sl.Magnitude("0.5"), TypeError, "density is a number, got str"),  # type: ignore[arg-type]
    "magnitude tensor": (
        lambda: sl.Magnitude(torch.tensor(0.5)),  # type: ignore[arg-type]
        TypeError,
        r"density is a number, got Tensor; take x\.item\(\)",
    ),
    "magnitude bool": (lambda: sl.Magnitude(True), TypeError, "density is a number, got bool"),
    "random 2": (lambda: sl.Random(2.0), ValueError, "Random: density is between 0 and 1, got 2.0"),
    "random nan": (lambda: sl.Random(math.nan), ValueError, "between 0 and 1, got nan"),
    "random seed": (
        lambda: sl.Random(0.5, generator=3),  # type: ignore[arg-type]
        TypeError,
        r"generator is a torch\.Generator or None, got int; torch\.Generator\(\)\.manual_seed",
    ),
    "threshold nan": (lambda: sl.Threshold(math.nan), ValueError, "at least 0, got nan"),
    "threshold -1": (lambda: sl.Threshold(-1.0), ValueError, r"at least 0, got -1\.0; sl\.KeepAll"),
    "threshold None": (lambda: sl.Threshold(None), TypeError, "value is a number, got NoneType"),  # type: ignore[arg-type]
    "nm 0": (lambda: sl.NM(0, 4), ValueError, "1 <= n <= m, got n=0, m=4"),
    "nm 5:4": (lambda: sl.NM(5, 4), ValueError, "1 <= n <= m, got n=5, m=4"),
    "nm float": (lambda: sl.NM(2.0, 4), TypeError, "n is an int, got float"),  # type: ignore[arg-type]
    "nm bool": (lambda: sl.NM(1, True), TypeError, "m is an int, got bool"),
    "blockwise number": (
        lambda: sl.Blockwise(0.5, 4),
        TypeError,
        r"Blockwise: sparsifier is a sparsifier such as sl\.Magnitude.*got 0\.5",
    ),
    "blockwise block": (lambda: sl.Blockwise(sl.KeepAll(), 0), ValueError, "must be positive"),
    "blockwise norm": (
        lambda: sl.Blockwise(sl.KeepAll(), 2, norm=-1),
        ValueError,
        "order 0 or above, got -1",
    ),
    "blockwise nan": (
        lambda: sl.Blockwise(sl.KeepAll(), 2, norm=math.nan),
        ValueError,
        "order 0 or above, got nan",
    ),
    "same dense": (
        lambda: sl.SamePattern(torch.eye(3)),
        TypeError,
        r"expected a layout.*got Tensor of shape \(3, 3\); x != 0 is a bool tensor",
    ),
    "same list": (lambda: sl.SamePattern([[1]]), TypeError, r"expected a layout.*got \[\[1\]\]"),  # type: ignore[arg-type]
    "same scalar": (
        lambda: sl.SamePattern(torch.tensor(True)),
        ValueError,
        "got a tensor without dimensions",
    ),
    "same 3-D sparse": (
        lambda: sl.SamePattern(torch.ones(2, 2, 2).to_sparse()),
        ValueError,
        r"a matrix of torch\.sparse, got shape \(2, 2, 2\)",
    ),
    "same of another shape": (
        lambda: sl.SamePattern(torch.eye(3) > 0).keep(torch.zeros(3, 4)),
        ValueError,
        r"the pattern's shape \(3, 3\).*got shape \(3, 4\)",
    ),
    "same of fewer dimensions": (
        lambda: sl.SamePattern(torch.eye(3) > 0).keep(torch.zeros(3)),
        ValueError,
        r"the pattern's shape \(3, 3\).*got shape \(3,\)",
    ),
    "same of other blocks": (
        lambda: sl.bsr(torch.zeros(4, 4), 2, keep=sl.SamePattern(torch.eye(3) > 0)),
        ValueError,
        r"the pattern's shape \(3, 3\).*got shape \(4, 4\)",
    ),
    "keep a bool tensor": (
        lambda: sl.Magnitude(0.5).keep(torch.ones(2, dtype=torch.bool)),
        TypeError,
        "expected numbers, got a bool tensor",
    ),
    "keep a list": (
        lambda: sl.Magnitude(0.5).keep([1.0]),  # type: ignore[arg-type]
        TypeError,
        "expected a dense tensor, got list",
    ),
    "keep a layout": (
        lambda: sl.Magnitude(0.5).keep(sl.bsr(torch.eye(4), 2)),
        TypeError,
        r"expected a dense tensor, got BSRTensor.*w\.to_dense\(\)",
    ),
    "keep sparse": (
        lambda: sl.Threshold(0.5).keep(torch.eye(4).to_sparse()),
        TypeError,
        r"got one of torch\.sparse_coo; pass x\.to_dense\(\)",
    ),
    "chunks of magnitude": (
        lambda: sl.Magnitude(0.5).chunks(torch.eye(4)),
        ValueError,
        r"Magnitude: chunks need.*sees all at once.*keep\(dense\).*sl\.Threshold",
    ),
    "chunks of blocks": (
        lambda: sl.Blockwise(sl.Magnitude(0.5), 2).chunks(torch.eye(4)),
        ValueError,
        "Blockwise: chunks need.*sees all at once",
    ),
    "chunks of a vector": (
        lambda: sl.Threshold(0.5).chunks(torch.zeros(4)),
        ValueError,
        r"got shape \(4,\); x\.view\(-1, k\)",
    ),
    "chunks of no row": (
        lambda: sl.Threshold(0.5).chunks(torch.eye(4), rows=0),
        ValueError,
        "rows is at least 1, got 0",
    ),
    "chunks of no byte": (
        lambda: sl.Threshold(0.5).chunks(torch.eye(4), chunk_bytes=-1),
        ValueError,
        "chunk_bytes is at least 1, got -1",
    ),
    "no choose": (
        lambda: sl.Sparsifier().keep(torch.eye(4)),
        NotImplementedError,
        r"expected a method choose\(magnitudes\)",
    ),
    "bsr class": (
        lambda: sl.bsr(torch.eye(4), 2, keep=sl.KeepAll),
        TypeError,
        r"bsr: keep is a sparsifier.*; call it: KeepAll\(\.\.\.\)",
    ),
    "bsr scope": (
        lambda: sl.bsr(torch.eye(4), 2, keep=type("S", (sl.KeepAll,), {"scope": "lazy"})()),
        ValueError,
        "scope is one of .*'streaming'.* got 'lazy' from S",
    ),
    "bsr nm": (
        lambda: sl.bsr(torch.eye(6), 2, keep=sl.NM(1, 2)),
        ValueError,
        "m=2 does not divide the last dimension 3",
    ),
    "bsr of objects": (
        lambda: sl.bsr(np.array([[None]]), 1),
        TypeError,
        "bsr: expected an array of numbers, got numpy's object",
    ),
    "bsr of a reversed array": (
        lambda: sl.bsr(np.eye(4)[::-1], 2),
        ValueError,
        r"bsr: .*stride.*numpy\.ascontiguousarray\(x\)",
    ),
}


@pytest.mark.parametrize("name", BAD_SPARSIFIERS)
def test_bad_input(name: str) -> None:
    call, error, match = BAD_SPARSIFIERS[name]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("name", ALL)
def test_repr_says_what_it_does(name: str) -> None:
    sparsifier = ALL[name]()
    assert repr(sparsifier).startswith(type(sparsifier).__name__ + "(")
    assert len(repr(sparsifier)) < 120
