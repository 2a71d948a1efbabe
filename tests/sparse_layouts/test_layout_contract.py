"""What every layout is as a tensor: dense form, views, copies, files, dtypes and devices."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparse_layouts as sl

Check = Callable[..., None]

# torch's own sparse tensors say so once a process
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")


def saved_and_loaded(value: object) -> object:
    """Through a file, with nothing allowed but what the library has declared safe."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_layout(actual: object, expected: sl.LayoutTensor) -> None:
    """The same class, pattern, dtype and values, bit for bit."""
    assert type(actual) is type(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.requires_grad == expected.requires_grad
    assert actual.same_pattern(expected)
    actual.validate()
    torch.testing.assert_close(actual.to_dense(), expected.to_dense(), rtol=0, atol=0)


def share_pattern(a: sl.LayoutTensor, b: sl.LayoutTensor) -> bool:
    return all(x is y for x, y in zip(a.inner_tensors()[1:], b.inner_tensors()[1:], strict=True))


# --- discovery --------------------------------------------------------------------------------------


def test_every_layout_has_examples(find_layouts_without_examples: Callable[[], list[str]]) -> None:
    assert find_layouts_without_examples() == []


def test_a_layout_without_examples_is_found(
    find_layouts_without_examples: Callable[[], list[str]],
) -> None:
    made = type("NewTensor", (sl.LayoutTensor,), {"__module__": "sparse_layouts.new_tensor"})
    assert find_layouts_without_examples() == ["NewTensor"]
    made.from_dense = classmethod(lambda cls, dense: None)
    assert find_layouts_without_examples() == []
    del made
    gc.collect()


# --- dense, and back --------------------------------------------------------------------------------


def test_round_trip(layout: sl.LayoutTensor) -> None:
    layout.validate()
    dense = layout.to_dense()
    assert type(dense) is Tensor
    assert dense.shape == layout.shape
    again = dense.sparse_mask(layout)
    assert_same_layout(again, layout)
    assert torch.equal(again.stored_values, layout.stored_values)


def test_to_dense_takes_a_dtype(layout: sl.LayoutTensor) -> None:
    assert torch.equal(layout.to_dense(torch.float32), layout.to_dense().float())


def test_sizes(layout: sl.LayoutTensor) -> None:
    dense = layout.to_dense()
    assert layout.nnz == int((torch.ones_like(dense).sparse_mask(layout).to_dense() != 0).sum())
    assert layout.density == layout.nnz / max(1, dense.numel())
    storages = {t.untyped_storage().data_ptr(): t for t in layout.inner_tensors() if t is not None}
    assert layout.nbytes == sum(t.untyped_storage().nbytes() for t in storages.values())
    assert layout.cached_bytes >= 0


def test_mask_sizes(mask: sl.BSRTensor) -> None:
    mask.validate()
    dense = mask.to_dense()
    assert dense.dtype == torch.bool
    assert mask.nnz == int(dense.sum())
    assert mask.density == mask.nnz / max(1, dense.numel())
    m, n = dense.shape[-2:]
    causal = torch.ones(m, n).tril().expand(dense.shape).sum()
    assert mask.density_of_causal == mask.nnz / max(1, int(causal))
    assert mask.pattern is mask


def test_pattern_is_the_mask_of_stored_entries(block_layout: sl.BSRTensor) -> None:
    mask = block_layout.pattern
    mask.validate()
    batch = block_layout.dim() - mask.dim()
    assert mask.shape == block_layout.shape[batch:]
    assert not block_layout.to_dense()[(~mask.to_dense()).expand(block_layout.shape)].any()
    assert mask.nnz * block_layout.shape[:batch].numel() == block_layout.nnz


def test_accessors_are_those_of_torch_sparse_bsr(small: sl.BSRTensor) -> None:
    expected = small.to_dense().to_sparse_bsr((4, 8))
    assert torch.equal(small.crow_indices(), expected.crow_indices().int())
    assert torch.equal(small.col_indices(), expected.col_indices().int())
    assert torch.equal(small.values(), expected.values())
    # of a transposed layout they are in row order too, though its blocks lie in the other's order
    flipped, expected = small.mT, small.to_dense().mT.to_sparse_bsr((8, 4))
    assert torch.equal(flipped.crow_indices(), expected.crow_indices().int())
    assert torch.equal(flipped.col_indices(), expected.col_indices().int())
    assert torch.equal(flipped.values(), expected.values())


def test_values_of_a_mask_raise(mask: sl.BSRTensor) -> None:
    with pytest.raises(TypeError, match=r"mask layout has none.*mask\.to\(dtype\)"):
        mask.values()


def nested(convert: Callable[[object], Tensor], made: object, lead: torch.Size) -> Tensor:
    if not lead:
        return convert(made)
    return torch.stack([nested(convert, one, lead[1:]) for one in made])


def check_other_forms(given: sl.BSRTensor) -> None:
    dense, lead = given.to_dense(), given.shape[:-2]
    if 0 in lead:
        assert given.to_scipy() == given.to_torch_sparse() == []
        return
    scipy = nested(lambda one: torch.from_numpy(one.toarray()), given.to_scipy(), lead)
    assert torch.equal(scipy, dense)
    sparse = nested(lambda one: one.to_dense(), given.to_torch_sparse(), lead)
    assert torch.equal(sparse, dense)


def test_other_forms(block_layout: sl.BSRTensor) -> None:
    check_other_forms(block_layout)


def test_other_forms_of_masks(mask: sl.BSRTensor) -> None:
    check_other_forms(mask)
