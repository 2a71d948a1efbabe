"""Small instances of every layout, by discovery.

A public layout class with a classmethod `from_dense` is tested as it is. One that is made in other
ways has a line in `EXAMPLES`; without either, `test_every_layout_has_examples` fails.

Fixtures: `layout` is each instance with values (float64), `mask` each mask, `block_layout` each
instance on blocks; `assert_close` compares with a derived tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from tests import rounding
from tests.sparse_layouts.user_csc import CscTensor, csc_times_dense

csc_times_dense.unregister()  # the suites run on README's layout by the fallback alone

F64 = torch.float64
Make = Callable[[], sl.LayoutTensor]


class DiagonalTensor(sl.LayoutTensor):
    """A user's own layout, as short as can be: only the fallback and the base class serve it."""

    fields = ("entries",)

    @classmethod
    def from_dense(cls, dense: Tensor) -> DiagonalTensor:
        size = min(dense.shape)
        return cls(dense[:size, :size].diagonal().clone(), shape=(size, size))

    def to_dense_entries(self) -> Tensor:
        return torch.diag(self.inner_entries)


# --- values ---------------------------------------------------------------------------------------


def dense_blocks(*lead: int, keep: float = 0.5, block: tuple[int, int] = (4, 8)) -> Tensor:
    """float64 (*lead, 24, 40), about `keep` of its blocks random and the others zero."""
    bm, bn = block
    kept = torch.rand(*lead, 24 // bm, 40 // bn) < keep
    spread = kept.repeat_interleave(bm, -2).repeat_interleave(bn, -1)
    return torch.randn(*lead, 24, 40, dtype=F64) * spread


def empty_row() -> sl.BSRTensor:
    dense = dense_blocks(keep=1.0)
    dense[4:8] = 0
    return sl.bsr(dense, (4, 8))


def on_mask(mask: sl.BSRTensor, *batch: int) -> sl.BSRTensor:
    """Random values on a mask; the bit tiles of partial blocks hold zeros."""
    return torch.randn(*batch, *mask.shape, dtype=F64).sparse_mask(mask)


def on_grouped_nm(*batch: int) -> sl.GroupedNMTensor:
    """Random values for every sample on one ragged grouped n:m pattern."""
    mask = sl.grouped_nm(torch.randn(10, 29), 2, 4, 2).pattern
    return torch.randn(*batch, *mask.shape, dtype=F64).sparse_mask(mask)


def on_nm(
    *batch: int,
    heads: tuple[int, ...] = (),
    size: tuple[int, int] = (24, 40),
    nm: tuple[int, int] = (2, 4),
) -> sl.NMTensor:
    """Random values for every sample on one pattern (a head)."""
    mask = sl.nm(torch.randn(*heads, *size), *nm).pattern
    return torch.randn(*batch, *mask.shape, dtype=F64).sparse_mask(mask)


def shared_heads() -> sl.LocalStrideTensor:
    """Heads 0 and 2 have equal patterns, and the block does not divide the length."""
    return sl.local_stride(30, block_size=8, local_blocks=1, vert_stride=2, num_heads=4)


def big_bird(source: str = "google", num_heads: int = 3) -> sl.BigBirdTensor:
    """Drawn: a pattern a head; "hf-eval": equal heads, in which block 0 counts three times."""
    return sl.bigbird(40, block_size=4, num_random_blocks=2, num_heads=num_heads, source=source)


BSR_VALUES: dict[str, Make] = {
    "matrix": lambda: sl.bsr(dense_blocks(), (4, 8)),
    "heads": lambda: sl.bsr(dense_blocks(3), (4, 8)),
    "batch": lambda: on_mask(sl.bsr(dense_blocks(), (4, 8)).pattern, 2),
    "batch-heads": lambda: on_mask(sl.bsr(dense_blocks(3), (4, 8)).pattern, 2),
    "partial": lambda: on_mask(sl.causal(30, block_size=8)),
    "ragged": lambda: on_mask(sl.mask_from(torch.rand(21, 30) < 0.3, (4, 8))),
    "scores": lambda: sl.sddmm(
        torch.randn(2, 1, 30, 3, dtype=F64), torch.randn(2, 4, 3, 30, dtype=F64), shared_heads()
    ),
    "transposed": lambda: sl.bsr(dense_blocks(), (4, 8)).mT,
    "transposed-partial": lambda: on_mask(sl.causal(30, block_size=8)).mT,
    "no-block": lambda: sl.bsr(torch.zeros(24, 40, dtype=F64), (4, 8)),
    "empty-row": empty_row,
    "all-stored": lambda: sl.bsr(dense_blocks(keep=1.0), (4, 8)),
    "no-sample": lambda: on_mask(sl.bsr(dense_blocks(), (4, 8)).pattern, 0),
    "no-row": lambda: sl.bsr(torch.zeros(0, 40, dtype=F64), (4, 8)),
}
LOCAL_STRIDE_VALUES: dict[str, Make] = {
    "matrix": lambda: on_mask(sl.local_stride(30, block_size=8, local_blocks=1, vert_stride=2)),
    "heads": lambda: on_mask(shared_heads().own_heads()),
}

# --- masks ----------------------------------------------------------------------------------------

BSR_MASKS: dict[str, Make] = {
    "blocks": lambda: sl.bsr_mask(torch.rand(6, 5) < 0.5, (4, 8)),
    "counts": lambda: sl.bsr_mask(torch.randint(3, (6, 5)), (4, 8)),
    "equal-heads": lambda: sl.bsr_mask((torch.rand(2, 6, 5) < 0.5)[[0, 1, 0]], (4, 8)),
    "causal": lambda: sl.causal(30, block_size=8),
    "ragged": lambda: sl.mask_from(torch.rand(2, 21, 30) < 0.3, (4, 8)),
    "documents": lambda: sl.document([[0, 7, 30], [0, 30, 30]], block_size=8),
    "transposed": lambda: sl.causal(30, block_size=8).mT,
    "no-block": lambda: sl.bsr_mask(torch.zeros(6, 5, dtype=torch.bool), (4, 8)),
    "all-stored": lambda: sl.bsr_mask(torch.ones(6, 5, dtype=torch.bool), (4, 8)),
    "no-token": lambda: sl.causal(0, block_size=8),
}
LOCAL_STRIDE_MASKS: dict[str, Make] = {
    "matrix": lambda: sl.local_stride(30, block_size=8, local_blocks=1, vert_stride=2),
    "heads": shared_heads,
}

BIG_BIRD_VALUES: dict[str, Make] = {
    "matrix": lambda: on_mask(big_bird("hf-eval", 1)),
    "heads": lambda: on_mask(big_bird()),
}
BIG_BIRD_MASKS: dict[str, Make] = {
    "matrix": lambda: big_bird("hf-eval", 1),
    "heads": big_bird,
    "equal-heads": lambda: big_bird("hf-eval"),
}

GROUPED_NM_VALUES: dict[str, Make] = {
    "2:4:4": lambda: sl.grouped_nm(torch.randn(24, 48, dtype=F64), 2, 4, 4),
    "ragged": lambda: sl.grouped_nm(torch.randn(10, 29, dtype=F64), 1, 3, 3),
    "transposed": lambda: sl.grouped_nm(torch.randn(10, 29, dtype=F64), 2, 4, 2).mT,
    "batch": lambda: on_grouped_nm(2),
    "no-row": lambda: sl.grouped_nm(torch.randn(0, 24, dtype=F64), 2, 4, 4),
}
GROUPED_NM_MASKS: dict[str, Make] = {
    "2:4:4": lambda: sl.grouped_nm(torch.randn(24, 48), 2, 4, 4).pattern,
    "ragged": lambda: sl.grouped_nm(torch.randn(10, 29), 1, 3, 3).pattern,
}

NM_VALUES: dict[str, Make] = {
    "2:4": lambda: sl.nm(torch.randn(24, 40, dtype=F64), 2, 4),
    "3:5": lambda: sl.nm(torch.randn(24, 40, dtype=F64), 3, 5),
    "heads": lambda: sl.nm(torch.randn(3, 24, 40, dtype=F64), 1, 2),
    "batch": lambda: on_nm(2),
    "batch-heads": lambda: on_nm(2, heads=(3,)),
    "transposed": lambda: sl.nm(torch.randn(24, 40, dtype=F64), 1, 8).mT,
    "scores": lambda: sl.sddmm(
        torch.randn(2, 1, 30, 3, dtype=F64),
        torch.randn(2, 4, 3, 32, dtype=F64),
        sl.nm(torch.randn(4, 30, 32), 2, 4).pattern,
    ),
    "fragments": lambda: sl.nm(torch.randn(16, 64, dtype=F64), 2, 4).in_order("fragments"),
    "fragments-batch-heads": lambda: on_nm(2, heads=(2,), size=(32, 128), nm=(2, 8)).in_order(
        "fragments"
    ),
    "fragments-transposed": lambda: sl.nm(torch.randn(16, 256, dtype=F64), 1, 8).mT.in_order(
        "fragments"
    ),
    "no-sample": lambda: on_nm(0),
    "no-row": lambda: sl.nm(torch.zeros(0, 40, dtype=F64), 2, 4),
    "no-column": lambda: sl.nm(torch.zeros(24, 0, dtype=F64), 2, 4),
}
NM_MASKS: dict[str, Make] = {
    "2:4": lambda: sl.nm(torch.randn(24, 40), 2, 4).pattern,
    "fragments": lambda: sl.nm(torch.randn(16, 128), 1, 4).pattern.in_order("fragments"),
    "heads": lambda: sl.nm(torch.randn(3, 24, 45), 5, 9).pattern,
    "transposed": lambda: sl.nm(torch.randn(24, 40), 1, 2).pattern.mT,
}


def reordered(height: int = 12, block: tuple[int, int] = (4, 8)) -> sl.ReorderedTensor:
    """Half of the blocks (4, 8) of a matrix (24, 40), or of smaller ones, in taller blocks."""
    return sl.reorder(sl.bsr(dense_blocks(block=block), block), height)


REORDERED_VALUES: dict[str, Make] = {
    "matrix": reordered,
    "single-rows": lambda: reordered(16, (1, 4)),
    "ragged": lambda: sl.reorder(on_mask(sl.mask_from(torch.rand(21, 30) < 0.3, (4, 8))), 8),
    "transposed": lambda: reordered().mT,
    "batch": lambda: on_mask(reordered().pattern, 2),
    "no-block": lambda: sl.reorder(sl.bsr(torch.zeros(24, 40, dtype=F64), (4, 8)), 8),
    "all-stored": lambda: sl.reorder(sl.bsr(dense_blocks(keep=1.0), (4, 8)), 8),
    "no-sample": lambda: on_mask(reordered().pattern, 0),
    "no-row": lambda: sl.reorder(sl.bsr(torch.zeros(0, 40, dtype=F64), (4, 8)), 8),
    "no-column": lambda: sl.reorder(sl.bsr(torch.zeros(24, 0, dtype=F64), (4, 8)), 8),
}
REORDERED_MASKS: dict[str, Make] = {
    "matrix": lambda: reordered().pattern,
    "ragged": lambda: REORDERED_VALUES["ragged"]().pattern,
    "transposed": lambda: reordered().pattern.mT,
}


def dense_entries(density: float = 0.4) -> Tensor:
    """float64 (24, 40), about so many of its entries not zero, one row and one column empty."""
    dense = torch.randn(24, 40, dtype=F64) * (torch.rand(24, 40) < density)
    dense[5] = dense[:, 7] = 0
    return dense


def with_long_lists(w: Any) -> Any:
    """A CSRTensor or CSCTensor with int64 lists."""
    return w.map_inner(Tensor.long, w.stored_values)


def compressed_values(make: Callable[[Tensor], sl.LayoutTensor]) -> dict[str, Make]:
    """Instances of `sl.csr` or `sl.csc`."""
    return {
        "matrix": lambda: make(dense_entries()),
        "batch": lambda: torch.randn(2, 24, 40, dtype=F64).sparse_mask(
            make(dense_entries()).pattern
        ),
        "int64": lambda: with_long_lists(make(dense_entries())),
        "transposed": lambda: make(dense_entries().mT).mT,
        "no-entry": lambda: make(torch.zeros(24, 40, dtype=F64)),
        "all-stored": lambda: make(torch.randn(24, 40, dtype=F64)),
        "no-sample": lambda: torch.randn(0, 24, 40, dtype=F64).sparse_mask(
            make(dense_entries()).pattern
        ),
        "no-row": lambda: make(torch.zeros(0, 40, dtype=F64)),
        "no-column": lambda: make(torch.zeros(24, 0, dtype=F64)),
    }


def compressed_masks(make: Callable[[Tensor], sl.LayoutTensor]) -> dict[str, Make]:
    """Masks of `sl.csr` or `sl.csc`."""
    names = ("matrix", "int64", "transposed", "no-entry", "all-stored", "no-row")
    values = compressed_values(make)
    return {name: lambda name=name: values[name]().pattern for name in names}


# class -> (instances with values, masks)
EXAMPLES: dict[type, tuple[dict[str, Make], dict[str, Make]]] = {
    sl.BSRTensor: (BSR_VALUES, BSR_MASKS),
    sl.LocalStrideTensor: (LOCAL_STRIDE_VALUES, LOCAL_STRIDE_MASKS),
    sl.GroupedNMTensor: (GROUPED_NM_VALUES, GROUPED_NM_MASKS),
    sl.NMTensor: (NM_VALUES, NM_MASKS),
    sl.BigBirdTensor: (BIG_BIRD_VALUES, BIG_BIRD_MASKS),
    sl.ReorderedTensor: (REORDERED_VALUES, REORDERED_MASKS),
    sl.CSRTensor: (compressed_values(sl.csr), compressed_masks(sl.csr)),
    sl.CSCTensor: (compressed_values(sl.csc), compressed_masks(sl.csc)),
}


def subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


def library_layouts() -> list[type]:
    """Every layout class that importing the library makes known, without bases of several, which
    name no fields.
    """
    found = [c for c in subclasses(sl.LayoutTensor) if c.__module__.startswith("sparse_layouts.")]
    return [c for c in found if c.fields or not c.__subclasses__()]


def examples_of(cls: type) -> tuple[dict[str, Make], dict[str, Make]]:
    """A class's instances; of a class without a line of its own, from dense matrices."""
    if cls in EXAMPLES:
        return EXAMPLES[cls]
    from_dense = getattr(cls, "from_dense", None)
    if from_dense is None:
        return {}, {}
    return {
        "random": lambda: from_dense(dense_blocks()),
        "zeros": lambda: from_dense(torch.zeros(24, 40, dtype=F64)),
        "all-stored": lambda: from_dense(dense_blocks(keep=1.0)),
    }, {}


def layouts_without_examples() -> list[str]:
    return [cls.__name__ for cls in library_layouts() if not examples_of(cls)[0]]


def parameters(masks: bool, base: type = sl.LayoutTensor) -> list[object]:
    classes = [c for c in [*library_layouts(), DiagonalTensor, CscTensor] if issubclass(c, base)]
    return [
        pytest.param(make, id=f"{cls.__name__}-{name}")
        for cls in classes
        for name, make in examples_of(cls)[masks].items()
    ]


@pytest.fixture(params=parameters(masks=False))
def layout(request: pytest.FixtureRequest, fixed_seeds: None) -> sl.LayoutTensor:
    """Each layout with values, a leaf without gradient."""
    return request.param()


def first_of_each(masks: bool) -> list[object]:
    """One instance of each class, the first of its examples."""
    seen: dict[str, object] = {}
    for each in parameters(masks):
        seen.setdefault(each.id.partition("-")[0], each)  # type: ignore[attr-defined]
    return list(seen.values())


@pytest.fixture
def contract_layouts() -> tuple[list[str], list[str]]:
    """The classes that the contract is tested on, and those of them that have masks."""
    named = [
        [each.id.partition("-")[0] for each in first_of_each(masks)] for masks in (False, True)
    ]  # type: ignore[attr-defined]
    return named[0], named[1]


@pytest.fixture(params=first_of_each(masks=False))
def one_layout(request: pytest.FixtureRequest, fixed_seeds: None) -> sl.LayoutTensor:
    """One matrix of each layout with values, for tests that take long."""
    return request.param()


@pytest.fixture(params=first_of_each(masks=True))
def one_mask(request: pytest.FixtureRequest, fixed_seeds: None) -> sl.LayoutTensor:
    """One matrix of each mask layout."""
    return request.param()


@pytest.fixture(params=parameters(masks=False, base=sl.BSRTensor))
def block_layout(request: pytest.FixtureRequest, fixed_seeds: None) -> sl.BSRTensor:
    """Each layout with values on blocks."""
    return request.param()


@pytest.fixture(params=parameters(masks=True, base=sl.BSRTensor))
def block_mask(request: pytest.FixtureRequest, fixed_seeds: None) -> sl.BSRTensor:
    """Each mask on blocks."""
    return request.param()


@pytest.fixture(params=parameters(masks=True))
def mask(request: pytest.FixtureRequest, fixed_seeds: None) -> sl.BSRTensor:
    """Each mask layout."""
    return request.param()


@pytest.fixture
def small() -> sl.BSRTensor:
    """One matrix of blocks (24, 40), half of them stored."""
    return BSR_VALUES["matrix"]()


@pytest.fixture
def find_layouts_without_examples() -> Callable[[], list[str]]:
    return layouts_without_examples


@pytest.fixture
def random_blocks() -> Callable[..., Tensor]:
    """`dense_blocks`: a dense (*lead, 24, 40) matrix, part of its blocks zero."""
    return dense_blocks


@pytest.fixture
def assert_close() -> Callable[..., None]:
    return rounding.assert_close
