"""Layouts in modules: state dicts, clipping, autocast, checkpoints, torch.func, GradScaler, masks
as buffers and as the masks of attention modules.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_layouts as sl

Check = Callable[..., None]
F64 = torch.float64


class Product(nn.Module):
    """x @ weight.mT: every layout serves it, by a kernel or densely."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def twins(layout: sl.LayoutTensor) -> tuple[Product, Product]:
    """A module with the layout, and its dense twin whose gradient is cut to what is stored."""
    dense = Product(layout.to_dense().contiguous())
    stored = torch.ones(layout.shape, dtype=layout.dtype).sparse_mask(layout).to_dense()
    dense.weight.register_hook(lambda grad: grad * stored.to(grad.device))
    return Product(layout.clone()), dense


def inputs(layout: sl.LayoutTensor, rows: int = 5) -> Tensor:
    return torch.randn(rows, layout.shape[-1], dtype=layout.dtype)


@pytest.fixture(autouse=True)
def dense_where_need_be() -> Any:
    """Some layouts have no kernel for some of this."""
    with sl.fallback("allow"):
        yield


# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.contract("state dicts")
def test_state_dict(one_layout: sl.LayoutTensor) -> None:
    model, other = Product(one_layout), Product(torch.zeros_like(one_layout))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    kept = other.weight
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.weight is kept
    assert torch.equal(kept.detach().to_dense(), one_layout.to_dense())


@pytest.mark.contract("state dicts")
def test_state_dict_of_another_pattern(
    one_layout: sl.LayoutTensor, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(1)
    other = request.node.callspec.params["one_layout"]()
    if other.same_pattern(one_layout):
        pytest.skip(f"a {type(other).__name__} of this size has one pattern")
    model = Product(one_layout)
    state = Product(other).state_dict()
    with pytest.raises(RuntimeError, match=r"stores other entries(.|\n)*assign=True"):
        model.load_state_dict(state)
    assert torch.equal(model.weight.detach().to_dense(), one_layout.to_dense())
    model.load_state_dict(state, assign=True)
    assert model.weight.same_pattern(other)
    assert torch.equal(model.weight.detach().to_dense(), other.to_dense())


@pytest.mark.contract("state dicts")
def test_state_dict_from_dense(one_layout: sl.LayoutTensor) -> None:
    sparse, dense = twins(one_layout)
    dense.load_state_dict(sparse.state_dict())
    assert type(dense.weight) is nn.Parameter
    assert torch.equal(dense.weight.detach(), one_layout.to_dense())
    with torch.no_grad():
        sparse.weight.zero_()
    sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse.weight.detach().to_dense(), one_layout.to_dense())


# --- clipping -------------------------------------------------------------------------------------


@pytest.mark.contract("clipping")
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("order", [2.0, 1.0, float("inf")])
def test_clip_grad_norm(
    order: float, foreach: bool, one_layout: sl.LayoutTensor, assert_close: Check
) -> None:
    x, (sparse, dense) = inputs(one_layout), twins(one_layout)
    norms = []
    for model in (sparse, dense):
        model(x).square().sum().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0, order, foreach=foreach))
    assert type(sparse.weight.grad) is type(one_layout)
    assert_close(norms[0], norms[1])
    assert_close(sparse.weight.grad, dense.weight.grad, scale=max(1.0, norms[1].item()))


@pytest.mark.contract("clipping")
@pytest.mark.parametrize("foreach", [False, True])
def test_clip_grad_value(foreach: bool, one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    x, (sparse, dense) = inputs(one_layout), twins(one_layout)
    for model in (sparse, dense):
        model(x).square().sum().backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.5, foreach=foreach)
    sparse.weight.grad.validate()
    assert_close(sparse.weight.grad, dense.weight.grad, scale=dense.weight.norm().item() * 100)
    assert sparse.weight.grad.to_dense().abs().max() <= 0.5


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.contract("accumulation")
def test_micro_batches(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    x, (sparse, dense) = inputs(one_layout, 6), twins(one_layout)
    for model in (sparse, dense):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for part in x.split(2):
                (model(part).square().sum() / 3).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=model is sparse)
    assert sparse.weight.grad is None
    assert_close(
        sparse.weight.detach(), dense.weight.detach(), scale=dense.weight.norm().item() * 9
    )


# --- autocast and GradScaler ----------------------------------------------------------------------


@pytest.mark.contract("autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, one_layout: sl.LayoutTensor) -> None:
    x, (sparse, dense) = inputs(one_layout).float(), twins(one_layout.float())
    exact = F.linear(x.double(), one_layout.float().to_dense().double())
    with torch.autocast("cpu", dtype):
        found, of_dense = sparse(x), dense(x)
    assert found.dtype == of_dense.dtype == dtype
    loss = (of_dense - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * loss
    found.float().square().sum().backward()
    assert sparse.weight.grad.dtype == torch.float32
    assert type(sparse.weight.grad) is type(one_layout)


@pytest.mark.contract("GradScaler")
def test_grad_scaler(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    x, (sparse, dense) = inputs(one_layout).float(), twins(one_layout.float())
    for model in (sparse, dense):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        before = model.weight.detach().clone()
        for scale in (1.0, float("inf"), 1.0):  # the second step is skipped
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean() * scale).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 4.0
        assert not torch.equal(model.weight.detach(), before)
    assert type(sparse.weight.grad) is type(one_layout)
    assert_close(
        sparse.weight.detach(), dense.weight.detach(), scale=dense.weight.norm().item() * 3
    )


@pytest.mark.gpu
@pytest.mark.contract("autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler_on_a_gpu(dtype: torch.dtype, one_layout: sl.LayoutTensor) -> None:
    x, (sparse, dense) = inputs(one_layout).float().cuda(), twins(one_layout.float())
    exact = F.linear(x.double(), dense.weight.detach().double().cuda())
    for model in (sparse.cuda(), dense.cuda()):
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        with torch.autocast("cuda", dtype):
            found = model(x)
        assert found.dtype == dtype
        if model is sparse:
            of_sparse = found
        scaler.scale(found.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    loss = (found - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (of_sparse - exact).abs().max() <= 2 * loss
    assert type(sparse.weight.grad) is type(one_layout)


# --- checkpoints and torch.func -------------------------------------------------------------------


@pytest.mark.contract("checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool, one_layout: sl.LayoutTensor) -> None:
    x, (sparse, _) = inputs(one_layout).requires_grad_(), twins(one_layout)
    torch.tanh(sparse(x)).sum().backward()
    expected, sparse.weight.grad, x.grad = (sparse.weight.grad, x.grad), None, None
    checkpoint(lambda x: torch.tanh(sparse(x)), x, use_reentrant=use_reentrant).sum().backward()
    assert type(sparse.weight.grad) is type(one_layout)
    assert torch.equal(sparse.weight.grad.to_dense(), expected[0].to_dense())
    assert torch.equal(x.grad, expected[1])


@pytest.mark.contract("torch.func")
def test_functional_call(one_layout: sl.LayoutTensor) -> None:
    x, model = inputs(one_layout), Product(torch.zeros(one_layout.shape, dtype=F64))
    leaf = one_layout.clone().requires_grad_()
    out = torch.func.functional_call(model, {"weight": leaf}, (x,))
    out.sum().backward()
    assert torch.equal(out, F.linear(x, leaf))
    assert type(leaf.grad) is type(one_layout)
    assert model.weight.grad is None


@pytest.mark.contract("torch.func")
def test_func_grad_of_dense_operands(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    x, dense = inputs(one_layout), one_layout.to_dense()
    found = torch.func.grad(lambda x: F.linear(x, one_layout).square().sum())(x)
    assert_close(found, torch.func.grad(lambda x: F.linear(x, dense).square().sum())(x))
    out, pull = torch.func.vjp(lambda x: F.linear(x, one_layout), x)
    cotangent = torch.randn_like(out)
    assert_close(pull(cotangent)[0], cotangent @ dense)


@pytest.mark.contract("torch.func")
def test_func_grad_of_a_layout_raises(one_layout: sl.LayoutTensor) -> None:
    x = inputs(one_layout)
    with pytest.raises(NotImplementedError, match=r"torch\.func.*differentiate with respect"):
        torch.func.grad(lambda w: F.linear(x, w).sum())(one_layout)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.contract("masks: buffers")
@pytest.mark.parametrize("persistent", [True, False])
def test_a_mask_as_a_buffer(persistent: bool, one_mask: Any) -> None:
    module = nn.Module()
    module.register_buffer("mask", one_mask, persistent=persistent)
    assert ("mask" in module.state_dict()) == persistent
    for converted in (module.double(), copy.deepcopy(module), module.to("meta")):
        assert type(converted.mask) is type(one_mask)
        assert converted.mask.dtype == torch.bool
    assert module.mask.device.type == "meta"
    again = nn.Module()
    again.register_buffer("mask", one_mask.clone(), persistent=persistent)
    file = io.BytesIO()
    torch.save(again.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.mask.to_dense(), one_mask.to_dense())


@pytest.mark.contract("masks: attention modules")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training: bool, need_weights: bool, one_mask: Any) -> None:
    """There True means: not attended to, the opposite of SDPA's masks."""
    rows, columns = one_mask.shape
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    query = torch.randn(2, rows, 8)
    key = query if rows == columns else torch.randn(2, columns, 8)
    with torch.set_grad_enabled(training):
        found = attention(query, key, key, attn_mask=one_mask, need_weights=need_weights)
        dense = one_mask.to_dense()
        expected = attention(query, key, key, attn_mask=dense, need_weights=need_weights)
    live = ~dense.all(-1)  # dense code makes NaN of a row that attends to nothing
    torch.testing.assert_close(found[0][:, live], expected[0][:, live])
    if need_weights:
        torch.testing.assert_close(found[1][:, live], expected[1][:, live])


@pytest.fixture
def barred() -> sl.BSRTensor:
    """The complement of a local-stride mask: what nn's modules call a mask."""
    return ~sl.local_stride(32, block_size=8, local_blocks=1, vert_stride=2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lead", [False, True])
def test_attention_modules_take_the_sparse_kernel(
    lead: bool, batch_first: bool, training: bool, barred: sl.BSRTensor
) -> None:
    if lead:  # a pattern for every sample and head
        local = sl.local_stride(32, block_size=8, local_blocks=1, vert_stride=2, num_heads=4)
        barred = ~local
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).train(training)
    x = torch.randn((2, 32, 8) if batch_first else (32, 2, 8))
    with sl.fallback("error"), torch.set_grad_enabled(training):
        found = attention(x, x, x, attn_mask=barred, need_weights=False)[0]
    expected = attention(x, x, x, attn_mask=barred.to_dense(), need_weights=False)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(
    norm_first: bool, activation: str, training: bool, barred: sl.BSRTensor
) -> None:
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, 0.0, activation, batch_first=True, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(2, 32, 8, requires_grad=training)
    with torch.set_grad_enabled(training):
        with sl.fallback("error"):
            found = encoder(x, mask=barred, is_causal=False)
        expected = encoder(x, mask=barred.to_dense(), is_causal=False)
    torch.testing.assert_close(found, expected)
    if training:
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)]
        torch.testing.assert_close(*grads)


def test_transformer_decoder(barred: sl.BSRTensor) -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)
    decoder, x = nn.TransformerDecoder(layer, 1), torch.randn(2, 32, 8)
    with sl.fallback("error"):
        found = decoder(x, x, tgt_mask=barred, memory_mask=barred, tgt_is_causal=False)
    expected = decoder(x, x, tgt_mask=barred.to_dense(), memory_mask=barred.to_dense())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_what_an_attention_module_does_densely(training: bool, barred: sl.BSRTensor) -> None:
    """Key padding beside the mask, weights asked for, a causal mask found out, a float layout."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(training)
    x, padding = torch.randn(2, 32, 8), torch.zeros(2, 32, dtype=torch.bool)
    padding[1, -4:] = True
    later, scores = ~sl.causal(32, block_size=8), sl.bsr(torch.randn(32, 32), 8)
    calls: dict[str, Callable[[Any], Tensor]] = {
        "padding": lambda m: attention(
            x, x, x, attn_mask=m, key_padding_mask=padding, need_weights=False
        )[0],
        "weights": lambda m: attention(x, x, x, attn_mask=m)[1],
        "causal": lambda m: encoder(x, mask=m),
    }
    for name, call in calls.items():
        mask = later if name == "causal" else barred
        with pytest.warns(sl.DenseFallbackWarning), sl.fallback("warn"):
            found = call(mask)
        torch.testing.assert_close(found, call(mask.to_dense()))
    torch.testing.assert_close(calls["weights"](scores), calls["weights"](scores.to_dense()))


def test_the_additive_form_is_for_modules_alone(barred: sl.BSRTensor) -> None:
    zeros = torch.zeros_like(barred, dtype=torch.float32)
    assert type(zeros) is Tensor
    assert not zeros.any()
    additive = F._canonical_mask(barred, "attn_mask", None, "", torch.float32)
    assert type(additive) is not Tensor
    assert "AdditiveMask([32, 32], torch.float32" in repr(additive)
    expected = F._canonical_mask(barred.to_dense(), "attn_mask", None, "", torch.float32)
    assert torch.equal(additive + 0, expected)
    assert torch.equal(
        additive.view(1, 1, 32, 32).expand(2, 3, -1, -1) + 0, expected.expand(2, 3, 32, 32)
    )
    assert torch.equal(additive.reshape(2, 16, 32), expected.reshape(2, 16, 32))
    with pytest.raises(TypeError, match="AdditiveMask"):
        additive.add_(1)
