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


# --- discovery ------------------------------------------------------------------------------------


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


# --- dense, and back ------------------------------------------------------------------------------


@pytest.mark.contract("dense form")
def test_round_trip(layout: sl.LayoutTensor) -> None:
    layout.validate()
    dense = layout.to_dense()
    assert type(dense) is Tensor
    assert dense.shape == layout.shape
    again = dense.sparse_mask(layout)
    assert_same_layout(again, layout)
    assert torch.equal(again.stored_values, layout.stored_values)


@pytest.mark.contract("dense form")
def test_to_dense_takes_a_dtype(layout: sl.LayoutTensor) -> None:
    assert torch.equal(layout.to_dense(torch.float32), layout.to_dense().float())


@pytest.mark.contract("dense form")
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


# --- views ----------------------------------------------------------------------------------------


def test_transposed_twice_is_the_same(block_layout: sl.BSRTensor) -> None:
    flipped = block_layout.mT
    flipped.validate()
    assert torch.equal(flipped.to_dense(), block_layout.to_dense().mT)
    # the values are shared, and nothing is sorted again on the way back
    assert flipped.stored_values.data_ptr() == block_layout.stored_values.data_ptr()
    assert torch.equal(flipped.mT.stored_values, block_layout.stored_values)
    assert torch.equal(flipped.mT.to_dense(), block_layout.to_dense())


def test_mask_transposed(mask: sl.BSRTensor) -> None:
    flipped = mask.mT
    flipped.validate()
    assert torch.equal(flipped.to_dense(), mask.to_dense().mT)
    assert torch.equal(flipped.mT.to_dense(), mask.to_dense())


@pytest.mark.parametrize(
    "transpose",
    [
        lambda w: w.mT,
        lambda w: w.T,
        lambda w: w.t(),
        lambda w: w.mH,
        lambda w: w.transpose(0, 1),
        lambda w: torch.transpose(w, -1, -2),
        lambda w: torch.swapaxes(w, 0, 1),
        lambda w: w.permute(1, 0),
        lambda w: torch.adjoint(w),
    ],
)
def test_faces_of_transpose(transpose: Callable[[Tensor], Tensor], small: sl.BSRTensor) -> None:
    with sl.fallback("error"):
        flipped = transpose(small)
    assert isinstance(flipped, sl.BSRTensor)
    assert torch.equal(flipped.to_dense(), small.to_dense().T)


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(0, 8)),
        (slice(4, 12),),
        (slice(8, 24), slice(16, 32)),
        (slice(8, 8), slice(None)),
        (Ellipsis, slice(8, None)),
        (slice(-4, None), slice(None, -8)),
    ],
    ids=str,
)
def test_slices_at_block_edges(index: tuple[object, ...], small: sl.BSRTensor) -> None:
    with sl.fallback("error"):
        cut = small[index]
    cut.validate()
    assert torch.equal(cut.to_dense(), small.to_dense()[index])


def test_slices_of_every_layout(block_layout: sl.BSRTensor) -> None:
    bm, bn = block_layout.block_size
    index = (Ellipsis, slice(bm, 3 * bm), slice(bn, None))
    with sl.fallback("error"):
        cut = block_layout[index]
    cut.validate()
    assert torch.equal(cut.to_dense(), block_layout.to_dense()[index])


def test_slices_of_masks(block_mask: sl.BSRTensor) -> None:
    bm, bn = block_mask.block_size
    index = (Ellipsis, slice(None, 2 * bm), slice(bn, None))
    with sl.fallback("error"):
        cut = block_mask[index]
    cut.validate()
    assert torch.equal(cut.to_dense(), block_mask.to_dense()[index])


@pytest.mark.parametrize(
    "index", [0, -1, (slice(1, None),), (1, slice(4, 8)), (slice(None), slice(4))]
)
def test_heads_by_index(index: object, random_blocks: Callable[..., Tensor]) -> None:
    w = sl.bsr(random_blocks(3), (4, 8))
    equal_heads = sl.bsr_mask((torch.rand(2, 6, 5) < 0.5)[[0, 1, 0]], (4, 8))
    with sl.fallback("error"):
        of_values, of_mask = w[index], equal_heads[index]
    of_values.validate()
    of_mask.validate()
    assert torch.equal(of_values.to_dense(), w.to_dense()[index])
    assert torch.equal(of_mask.to_dense(), equal_heads.to_dense()[index])


@pytest.mark.parametrize("index", [0, 1, slice(1, None), (1, 2), (slice(None), 0)], ids=str)
def test_samples_by_index(index: object, random_blocks: Callable[..., Tensor]) -> None:
    mask = sl.bsr(random_blocks(3), (4, 8)).pattern
    w = torch.randn(2, *mask.shape).sparse_mask(mask)
    with sl.fallback("error"):
        chosen = w[index]
    chosen.validate()
    assert torch.equal(chosen.to_dense(), w.to_dense()[index])


@pytest.mark.parametrize(
    "index", [(slice(1, None),), (0, 1), (slice(None, None, 2),), (None,)], ids=str
)
def test_other_indices_are_dense_and_say_so(index: tuple[object, ...], small: sl.BSRTensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning, match=r"Tensor\.__getitem__"):
        cut = small[index]
    assert type(cut) is Tensor
    assert torch.equal(cut, small.to_dense()[index])


def test_an_index_out_of_range_raises(random_blocks: Callable[..., Tensor]) -> None:
    w = sl.bsr(random_blocks(3), (4, 8))
    with pytest.raises(IndexError):
        w[3]


def test_views_share_values_with_their_base(small: sl.BSRTensor) -> None:
    small.mT.mul_(2.0)
    flipped = small.mT
    before = small.to_dense()
    flipped.zero_()
    assert before.any()
    assert not small.to_dense().any()


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.contract("copies")
def test_detach_shares_everything(layout: sl.LayoutTensor) -> None:
    layout.requires_grad_()
    detached = layout.detach()
    assert not detached.requires_grad
    assert_same_layout(detached, layout.requires_grad_(False))
    assert share_pattern(detached, layout)
    assert detached.stored_values.data_ptr() == layout.stored_values.data_ptr()


@pytest.mark.contract("copies")
@pytest.mark.parametrize("duplicate", [torch.clone, copy.deepcopy])
def test_a_copy_shares_the_pattern_and_not_the_values(
    duplicate: Callable[[Tensor], Tensor], layout: sl.LayoutTensor
) -> None:
    made = duplicate(layout)
    assert_same_layout(made, layout)
    assert share_pattern(made, layout)
    before = layout.to_dense()
    made.fill_(7.0)
    assert torch.equal(layout.to_dense(), before)
    if layout.nnz:
        assert not torch.equal(made.to_dense(), before)


@pytest.mark.contract("masks: copies and files")
def test_mask_copies(mask: sl.BSRTensor) -> None:
    for made in (mask.clone(), copy.deepcopy(mask), mask.detach(), copy.copy(mask)):
        assert_same_layout(made, mask)
        assert share_pattern(made, mask)


def test_deepcopy_keeps_gradients_parameters_and_ties(small: sl.BSRTensor) -> None:
    weight = nn.Parameter(small)
    weight.grad = torch.ones(24, 40, dtype=small.dtype).sparse_mask(small)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["a"].weight = model["b"].weight = weight
    again = copy.deepcopy(model)
    assert again["a"].weight is again["b"].weight
    assert isinstance(again["a"].weight, nn.Parameter)
    assert_same_layout(again["a"].weight.grad, weight.grad)
    assert again["a"].weight.grad is not weight.grad


def test_deepcopy_of_a_result_raises(small: sl.BSRTensor) -> None:
    result = small.requires_grad_() * 2
    with pytest.raises(RuntimeError, match=r"created explicitly.*detach"):
        copy.deepcopy(result)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.contract("files")
@pytest.mark.parametrize(
    "through", [saved_and_loaded, lambda w: pickle.loads(pickle.dumps(w))], ids=["save", "pickle"]
)
def test_files(through: Callable[[object], object], layout: sl.LayoutTensor) -> None:
    assert_same_layout(through(layout), layout)
    layout.requires_grad_()
    assert_same_layout(through(layout), layout)


@pytest.mark.contract("masks: copies and files")
@pytest.mark.parametrize(
    "through", [saved_and_loaded, lambda w: pickle.loads(pickle.dumps(w))], ids=["save", "pickle"]
)
def test_mask_files(through: Callable[[object], object], mask: sl.BSRTensor) -> None:
    again = through(mask)
    assert_same_layout(again, mask)
    assert repr(again) == repr(mask)


@pytest.mark.contract("files")
def test_a_file_of_a_parameter_and_its_optimizer(layout: sl.LayoutTensor) -> None:
    weight = nn.Parameter(layout)
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    again, state = saved_and_loaded([weight, optimizer.state_dict()])
    assert isinstance(again, nn.Parameter)
    assert_same_layout(again, weight)
    assert_same_layout(state["state"][0]["exp_avg"], optimizer.state[weight]["exp_avg"])
    other = torch.optim.Adam([again])
    other.load_state_dict(state)
    assert_same_layout(other.state[again]["exp_avg"], optimizer.state[weight]["exp_avg"])


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made


def test_load_state_dict_onto_the_same_pattern(small: sl.BSRTensor) -> None:
    model = linear(torch.zeros_like(small))
    parameter = model.weight
    model.load_state_dict(saved_and_loaded(linear(small).state_dict()))
    assert model.weight is parameter
    assert torch.equal(parameter.to_dense(), small.to_dense())


def test_load_state_dict_onto_another_pattern(
    small: sl.BSRTensor, random_blocks: Callable[..., Tensor]
) -> None:
    model, state = linear(sl.bsr(random_blocks(), (4, 8))), linear(small).state_dict()
    with pytest.raises(RuntimeError, match=r"stores other entries(.|\n)*assign=True"):
        model.load_state_dict(state)
    model.load_state_dict(state, assign=True)
    assert_same_layout(model.weight, nn.Parameter(small))


def test_load_state_dict_between_dense_and_layout(small: sl.BSRTensor) -> None:
    dense = linear(torch.zeros(24, 40, dtype=small.dtype))
    dense.load_state_dict(linear(small).state_dict())
    assert type(dense.weight) is nn.Parameter
    assert torch.equal(dense.weight, small.to_dense())
    sparse = linear(torch.zeros_like(small))
    sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse.weight.to_dense(), small.to_dense())


# --- dtypes and devices ---------------------------------------------------------------------------


@pytest.mark.contract("dtypes and devices")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_to_dtype(dtype: torch.dtype, layout: sl.LayoutTensor) -> None:
    made = layout.to(dtype)
    made.validate()
    assert type(made) is type(layout)
    assert made.dtype == dtype
    assert share_pattern(made, layout)
    assert torch.equal(made.to_dense(), layout.to_dense().to(dtype))
    assert layout.to(layout.dtype) is layout


@pytest.mark.contract("dtypes and devices")
def test_to_dtype_is_differentiable(layout: sl.LayoutTensor) -> None:
    layout.requires_grad_().float().sum().backward()
    assert layout.grad.dtype == layout.dtype
    ones = torch.ones(layout.shape, dtype=layout.dtype).sparse_mask(layout)
    assert_same_layout(layout.grad, ones)


@pytest.mark.contract("masks: copies and files")
def test_a_mask_in_another_dtype_has_ones(mask: sl.BSRTensor) -> None:
    ones = mask.to(torch.float32)
    ones.validate()
    assert torch.equal(ones.to_dense(), mask.to_dense().float())


@pytest.mark.contract("dtypes and devices")
def test_values_do_not_become_bool(layout: sl.LayoutTensor) -> None:
    with pytest.raises(TypeError, match=r"cannot become bool.*w\.pattern"):
        layout.to(torch.bool)


@pytest.mark.contract("dtypes and devices")
def test_to_meta_and_empty(layout: sl.LayoutTensor) -> None:
    on_meta = layout.to("meta")
    assert type(on_meta) is type(layout)
    assert (on_meta.device.type, on_meta.shape, on_meta.dtype) == (
        "meta",
        layout.shape,
        layout.dtype,
    )
    assert "meta" in repr(on_meta)
    assert all(t is None or t.device.type == "meta" for t in on_meta.inner_tensors())


@pytest.mark.contract("masks: copies and files")
def test_masks_to_meta(mask: sl.BSRTensor) -> None:
    on_meta = mask.to("meta")
    assert type(on_meta) is type(mask)
    assert (on_meta.device.type, on_meta.dtype) == ("meta", torch.bool)
    assert "meta" in repr(on_meta)


@pytest.mark.contract("dtypes and devices")
def test_module_conversions_keep_the_parameter(layout: sl.LayoutTensor) -> None:
    model = nn.ParameterList([layout])
    for convert, dtype in (("half", torch.float16), ("double", torch.float64)):
        getattr(model, convert)()
        assert isinstance(model[0], nn.Parameter)
        assert type(model[0]) is type(layout)
        assert model[0].dtype == dtype
    model.to(torch.float32)
    assert model[0].dtype == torch.float32
    assert model[0].to_dense().dtype == torch.float32
    assert torch.equal(model[0].to_dense(), layout.half().float().to_dense())


# --- what it says of itself -----------------------------------------------------------------------


@pytest.mark.contract("printing and hashing")
def test_repr(layout: sl.LayoutTensor) -> None:
    text = repr(layout.requires_grad_())
    assert text.startswith(f"{type(layout).__name__}([")
    for part in ("float64", "cpu", f"density {layout.density:.2%}", "requires_grad"):
        assert part in text
