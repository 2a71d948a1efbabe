"""Attention over sequences, as users call it: packed and padded equal every sequence alone; what a
GPU must not do with lengths; and the pieces by which a Triton program finds its sequence.

Kernels on all devices have their cases in `cases.py`, calls on a GPU theirs in
`test_public_calls.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sparse_layouts as sl
from sparse_layouts.block_pattern import dense_counts
from sparse_layouts.kernels.block_attention.sequences import packed_sequences, padded_sequences
from tests.conftest import HAS_TRITON
from tests.rounding import assert_close

F64 = torch.float64
LONGEST = 60
# self-attention, a chunk after 23 keys, nothing, no keys, one query, more queries than keys
QUERIES, KEYS = (60, 19, 0, 4, 1, 30), (60, 42, 0, 0, 33, 20)
Mask = Callable[[], sl.BSRTensor]
MASKS: dict[str, Mask] = {
    "causal": lambda: sl.causal(LONGEST, block_size=16),
    "longer than any sequence": lambda: sl.causal(100, block_size=16),
    "not causal": lambda: sl.sliding_window(LONGEST, block_size=8, window=9, causal=False),
    "sinks": lambda: sl.sink_window(LONGEST, block_size=16, window=20, sinks=3),
    "by query head": lambda: sl.local_stride(
        64, block_size=8, local_blocks=2, vert_stride=3, num_heads=4
    ),
    "by KV head": lambda: sl.local_stride(
        64, block_size=8, local_blocks=2, vert_stride=2, num_heads=2
    ),
    "by sample": lambda: sl.document(
        [[0, 9 + b, 40, LONGEST] for b in range(len(KEYS))], block_size=16
    ),
    "by sample and head": lambda: sl.mask_from(
        torch.rand(len(KEYS), 4, LONGEST, LONGEST) < 0.5, 16
    ),
    "counted": lambda: sl.bigbird(64, block_size=4, num_heads=4, source="hf-eval"),
    "without a block": lambda: sl.bsr_mask(torch.zeros(4, 4, dtype=torch.bool), 16),
}


class Given(NamedTuple):
    """Sequences by themselves: q, k, v (H, length, D) each, and the gradients of out and lse."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    dout: list[Tensor]
    dlse: list[Tensor]


def given(dtype: torch.dtype = F64) -> Given:
    def each(lengths: tuple[int, ...], heads: int, *size: int) -> list[Tensor]:
        made = [torch.randn(heads, n, *size, dtype=F64) for n in lengths]
        return [t.to(dtype).requires_grad_() for t in made]

    return Given(
        each(QUERIES, 4, 8),
        each(KEYS, 2, 8),
        each(KEYS, 2, 6),
        each(QUERIES, 4, 6),
        each(QUERIES, 4),
    )


def alone(parts: Given, mask: sl.BSRTensor) -> list[list[Tensor]]:
    """out and lse of every sequence in dense torch, and the gradients of q, k and v."""
    results = []
    for b, (q, k, v, dout, dlse) in enumerate(zip(*parts, strict=True)):
        counts = rows_of_sequence(mask, b, q.shape[1], k.shape[1])
        scores = q @ k.repeat_interleave(2, 0).mT / 8**0.5 + counts.log()
        some = counts.any(-1)
        lse = torch.where(some[..., None], scores, 0.0).logsumexp(-1) if k.shape[1] else dlse * 0
        p = torch.where(some[..., None], scores - lse[..., None], -torch.inf).exp()
        out = p @ v.repeat_interleave(2, 0)
        outputs, gradients = (out, lse), (dout, dlse * some)
        grads = torch.autograd.grad(outputs, (q, k, v), gradients, materialize_grads=True)
        results.append((out.detach(), lse.detach().masked_fill(~some, -torch.inf), *grads))
    return [list(kind) for kind in zip(*results, strict=True)]


def rows_of_sequence(mask: sl.BSRTensor, b: int, queries: int, keys: int) -> Tensor:
    """(4, queries, keys) float64: how often the mask counts, 0 in rows before the first key."""
    counts = dense_counts(mask.block_pattern)
    counts = counts.view((1,) * (4 - counts.dim()) + counts.shape)
    counts = counts[b % counts.shape[0], :, max(keys - queries, 0) : keys, :keys]
    counts = counts.repeat_interleave(4 // counts.shape[0], 0)
    return F.pad(counts, (0, 0, queries - counts.shape[1], 0)).to(F64)


def pack(parts: list[Tensor]) -> Tensor:
    """(T, H, ...) of (H, length, ...) each."""
    return torch.cat([t.transpose(0, 1) for t in parts]).detach()


def pad(parts: list[Tensor], rows: int, left: bool = False) -> Tensor:
    """(B, H, rows, ...), NaN where there is padding."""
    out = parts[0].new_full((len(parts), parts[0].shape[0], rows, *parts[0].shape[2:]), torch.nan)
    for own, t in zip(out, parts, strict=True):
        own[:, rows - t.shape[1] if left else 0 :][:, : t.shape[1]] = t.detach()
    return out


def unpadded(t: Tensor, lengths: tuple[int, ...], left: bool = False) -> list[Tensor]:
    """What `pad` took, and a check that the rest is 0, or -inf as of a logsumexp."""
    rows = t.shape[2]
    parts = []
    for own, n in zip(t, lengths, strict=True):
        first = rows - n if left else 0
        outside = torch.cat([own[:, :first], own[:, first + n :]], 1)
        assert bool(((outside == 0) | outside.isneginf()).all())
        parts.append(own[:, first : first + n])
    return parts


def ends(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(dtype)


def numbers(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


def run_packed(parts: Given, mask: sl.BSRTensor, **options: Any) -> list[list[Tensor]]:
    """What `alone` returns, of one packed call."""
    q, k, v, dout, dlse = (pack(t) for t in parts)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    cu = {"cu_seqlens_q": ends(QUERIES), "cu_seqlens_k": ends(KEYS)}
    out, lse = sl.attention(*leaves, mask, return_lse=True, **cu, **options)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse.T))
    by_row = (out, lse.T, *grads)
    lengths = (QUERIES, QUERIES, QUERIES, KEYS, KEYS)
    return [
        [part.transpose(0, 1) for part in t.detach().split(n)]
        for t, n in zip(by_row, lengths, strict=True)
    ]


def run_padded(parts: Given, mask: sl.BSRTensor, left: bool, **options: Any) -> list[list[Tensor]]:
    """What `alone` returns, of one padded call; NaN in the padding."""
    q, dout, dlse = (pad(t, 70) for t in (parts.q, parts.dout, parts.dlse))
    k, v = (pad(t, 65, left) for t in (parts.k, parts.v))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    lens = {"q_lens": numbers(QUERIES), "kv_lens": numbers(KEYS)}
    if left:
        lens["kv_starts"] = 65 - lens.pop("kv_lens")
    out, lse = sl.attention(*leaves, mask, return_lse=True, **lens, **options)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    by_row = [unpadded(t.detach(), QUERIES) for t in (out, lse, grads[0])]
    return [*by_row, *(unpadded(t, KEYS, left) for t in grads[1:])]


WAYS: dict[str, Callable[..., list[list[Tensor]]]] = {
    "packed": run_packed,
    "padded": lambda *args, **options: run_padded(*args, left=False, **options),
    "left padded": lambda *args, **options: run_padded(*args, left=True, **options),
}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """A dense fallback is an error."""
    with sl.fallback("error"):
        yield


# --- the same as every sequence alone -------------------------------------------------------------


def check_all(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    """Equal up to a few roundings of each kind of result."""
    for parts, wanted in zip(found, expected, strict=True):
        norm = float(torch.cat(wanted, 1).nan_to_num(0, 0, 0).norm())
        for got, right in zip(parts, wanted, strict=True):
            assert_close(got, right, scale=norm)


@ways
@pytest.mark.parametrize("name", MASKS)
def test_each_sequence_is_as_if_alone(name: str, way: str, poisoned_empty: None) -> None:
    mask, parts = MASKS[name](), given()
    check_all(WAYS[way](parts, mask), alone(parts, mask))


@ways
def test_a_plain_call_on_each_gives_the_same(way: str) -> None:
    parts, mask = given(), MASKS["causal"]()
    found = WAYS[way](parts, mask)
    for b, (q, k, v, dout, dlse) in enumerate(zip(*parts, strict=True)):
        if not 0 < q.shape[1] <= k.shape[1]:
            continue
        own = sl.causal(k.shape[1], block_size=16)
        results = sl.attention(q, k, v, own, return_lse=True)
        grads = torch.autograd.grad(results, (q, k, v), (dout, dlse))
        check_all([[kind[b]] for kind in found], [[t.detach()] for t in (*results, *grads)])


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, way: str) -> None:
    """Accuracy is the kernel suite's business; here: results in the dtype, lse in float32."""
    mask = MASKS["causal"]()
    parts = given(dtype)
    parts = parts._replace(dlse=[t.detach().float() for t in parts.dlse])
    out, lse, *grads = WAYS[way](parts, mask)
    assert {t.dtype for kind in (out, *grads) for t in kind} == {dtype}
    assert {t.dtype for t in lse} == {torch.float32}


def leaves_of(parts: Given) -> list[Tensor]:
    """Packed q, k, v."""
    return [pack(t).requires_grad_() for t in parts[:3]]


CU = {"cu_seqlens_q": ends(QUERIES), "cu_seqlens_k": ends(KEYS)}


@ways
def test_a_bias_lies_on_the_pattern(way: str) -> None:
    parts, mask = given(), MASKS["sinks"]()
    base = torch.randn(LONGEST, LONGEST, dtype=F64)
    (bias_grad,) = torch.autograd.grad(*dense_with_bias(parts, mask, base.requires_grad_()))
    bias = base.detach().sparse_mask(mask).requires_grad_()
    out, *_ = WAYS[way](parts, mask, bias=bias)
    check_all([out], [[t.detach() for t in dense_outs(parts, mask, base)]])
    leaves = leaves_of(parts)
    packed = sl.attention(*leaves, mask, bias=bias, **CU)
    (found,) = torch.autograd.grad(packed, bias, pack(parts.dout))
    assert isinstance(found, sl.BSRTensor)
    assert_close(found, bias_grad)


def dense_outs(parts: Given, mask: sl.BSRTensor, bias: Tensor) -> list[Tensor]:
    outs = []
    for b, (q, k, v, *_) in enumerate(zip(*parts, strict=True)):
        queries, keys = q.shape[1], k.shape[1]
        counts = rows_of_sequence(mask, b, queries, keys)
        own = F.pad(bias[max(keys - queries, 0) : keys, :keys], (0, 0, max(queries - keys, 0), 0))
        scores = q @ k.repeat_interleave(2, 0).mT / 8**0.5 + own
        p = torch.where(counts > 0, scores, -1e300).softmax(-1) * (counts > 0)
        outs.append(p @ v.repeat_interleave(2, 0))
    return outs


def dense_with_bias(parts: Given, mask: sl.BSRTensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A loss whose gradient is that of out by the given dout, and the bias."""
    outs = dense_outs(parts, mask, bias)
    return sum((o * d.detach()).sum() for o, d in zip(outs, parts.dout, strict=True)), bias


# --- dropout, and what else must not depend on how sequences lie ----------------------------------


def dropped(way: str) -> list[list[Tensor]]:
    torch.manual_seed(5)
    parts = given()
    torch.manual_seed(7)
    return WAYS[way](parts, MASKS["by query head"](), dropout_p=0.4)


def test_dropout_draws_the_same_packed_and_padded() -> None:
    expected = dropped("packed")
    for way in ("padded", "left padded"):
        check_all(dropped(way), expected)
    parts = given()
    assert not torch.equal(expected[0][0], WAYS["packed"](parts, MASKS["by query head"]())[0][0])


def test_dropout_of_a_full_batch_is_that_of_the_plain_batch() -> None:
    mask = MASKS["causal"]()
    q, k, v = (torch.randn(3, 2, LONGEST, 8, dtype=F64) for _ in range(3))
    results = []
    for lens in ({}, {"q_lens": torch.full((3,), LONGEST)}, {"kv_starts": torch.zeros(3).long()}):
        torch.manual_seed(3)
        results.append(sl.attention(q, k, v, mask, dropout_p=0.5, **lens))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_packed_equals_padded_to_the_bit() -> None:
    parts, mask = given(), MASKS["by KV head"]()
    expected = run_packed(parts, mask)
    for left in (False, True):
        for found, wanted in zip(run_padded(parts, mask, left), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_gradcheck(kind: str) -> None:
    mask = sl.sliding_window(9, block_size=4, window=5)
    if kind == "packed":
        shapes = ((13, 2, 3), (19, 1, 3), (19, 1, 2))
        lens = {"cu_seqlens_q": ends((9, 0, 3, 1)), "cu_seqlens_k": ends((9, 2, 7, 1))}
    else:
        shapes = ((3, 2, 6, 3), (3, 1, 10, 3), (3, 1, 10, 2))
        lens = {"q_lens": numbers((6, 2, 0)), "kv_starts": numbers((1, 6, 9))}
    leaves = [torch.randn(s, dtype=F64, requires_grad=True) for s in (*shapes, (9, 9))]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        own = bias.sparse_mask(mask)
        out, lse = sl.attention(q, k, v, mask, bias=own, return_lse=True, **lens)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(attend, leaves)


def test_torch_func() -> None:
    parts, mask = given(), MASKS["causal"]()
    leaves = leaves_of(parts)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sl.attention(q, k, v, mask, **CU).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*(t.detach() for t in leaves))
    for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_close(a, b)


def test_autocast() -> None:
    parts, mask = given(torch.float32), MASKS["causal"]()
    q, k, v = leaves_of(parts)
    with torch.autocast("cpu", torch.bfloat16):
        out = sl.attention(q, k, v, mask, **CU)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


# --- compiled -------------------------------------------------------------------------------------


def packed_step(q: Tensor, k: Tensor, v: Tensor, mask: Any, cu_q: Tensor, cu_k: Tensor) -> Any:
    return sl.attention(q, k, v, mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)


def padded_step(q: Tensor, k: Tensor, v: Tensor, mask: Any, lens: Tensor, starts: Tensor) -> Any:
    return sl.attention(q, k, v, mask, q_lens=lens, kv_starts=starts, return_lse=True)


# dynamo itself makes an instance of an autograd.Function, to trace with
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("step", [packed_step, padded_step])
def test_compiled_code_takes_other_lengths(step: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    mask = MASKS["causal"]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    if step is packed_step:
        leaves = [torch.randn(100, 2, 8, dtype=F64, requires_grad=True) for _ in range(3)]
        lengths = [(ends((60, 30, 10)), ends((60, 38, 2))), (ends((1, 9, 60)), ends((40, 0, 60)))]
    else:
        leaves = [torch.randn(2, 2, 50, 8, dtype=F64, requires_grad=True) for _ in range(3)]
        lengths = [(numbers((50, 3)), numbers((0, 7))), (numbers((0, 20)), numbers((50, 1)))]
    for one, other in lengths:
        expected = step(*leaves, mask, one, other)
        found = compiled(*leaves, mask, one, other)
        seeds = [torch.randn_like(t) for t in expected]
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
        wanted = torch.autograd.grad(expected, leaves, seeds)
        for a, b in zip(torch.autograd.grad(found, leaves, seeds), wanted, strict=True):
            assert_close(a, b)
    assert counter.frame_count == 1


def one_for_both(q: Tensor, k: Tensor, v: Tensor, mask: Any, lens: Tensor) -> Any:
    if q.dim() == 3:
        return sl.attention(q, k, v, mask, cu_seqlens_q=lens, cu_seqlens_k=lens)
    return sl.attention(q, k, v, mask, q_lens=lens, kv_lens=lens, kv_starts=lens)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("packed", [True, False])
def test_compiled_code_takes_one_tensor_for_both(packed: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    mask, shape = MASKS["causal"](), (60, 2, 8) if packed else (2, 2, 60, 8)
    leaves = [torch.randn(shape, dtype=F64, requires_grad=True) for _ in range(3)]
    lens = ends((40, 20), dtype) if packed else numbers((30, 17)).to(dtype)
    compiled = torch.compile(one_for_both, fullgraph=True, backend="aot_eager")
    found, expected = (f(*leaves, mask, lens) for f in (compiled, one_for_both))
    assert_close(found, expected)
    seed = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, seed)
    for a, b in zip(torch.autograd.grad(found, leaves, seed), wanted, strict=True):
        assert_close(a, b)


# --- forms of the arguments -----------------------------------------------------------------------


def test_int64_and_strided_lengths_are_taken() -> None:
    parts, mask = given(), MASKS["causal"]()
    leaves = leaves_of(parts)
    expected = sl.attention(*leaves, mask, **CU)
    for cu_q, cu_k in (
        (ends(QUERIES, torch.int64), ends(KEYS)),
        (ends(QUERIES)[:, None].expand(-1, 2)[:, 0], ends(KEYS).repeat_interleave(2)[::2]),
    ):
        found = sl.attention(*leaves, mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        assert torch.equal(found, expected)


def test_one_of_them_for_queries_and_keys() -> None:
    q, k, v = (torch.randn(100, 2, 8, dtype=F64) for _ in range(3))
    cu, mask = ends((60, 3, 37)), MASKS["causal"]()
    same = sl.attention(q, k, v, mask, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert torch.equal(same, sl.attention(q, k, v, mask, cu_seqlens_q=cu, cu_seqlens_k=cu.clone()))


def test_rows_after_the_last_sequence_belong_to_none() -> None:
    q, k, v = (torch.randn(50, 2, 8, dtype=F64) for _ in range(3))
    for t in (q, k, v):
        t[40:] = torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    cu, mask = ends((30, 10)), MASKS["causal"]()
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "return_lse": True}
    out, lse = sl.attention(*leaves, mask, **options)
    dout = torch.randn_like(out)
    dout[40:] = torch.nan
    grads = torch.autograd.grad(out, leaves, dout)
    for t in (out, *grads):
        assert bool(t[:40].isfinite().all())
        assert bool((t[40:] == 0).all())
    assert bool(lse[:, 40:].isneginf().all())


@pytest.mark.parametrize("count", [0, 1])
def test_no_sequence_and_one(count: int) -> None:
    mask = MASKS["causal"]()
    q, k, v = (torch.randn(count * 20, 2, 8, dtype=F64, requires_grad=True) for _ in range(3))
    cu = ends((20,) * count)
    out = sl.attention(q, k, v, mask, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert out.shape == q.shape
    assert all(g.shape == q.shape for g in torch.autograd.grad(out.sum(), (q, k, v)))
    batch = [t.detach().view(count, 20, 2, 8).transpose(1, 2).requires_grad_() for t in (q, k, v)]
    padded = sl.attention(*batch, mask, q_lens=torch.full((count,), 20))
    assert_close(padded.transpose(1, 2).reshape(out.shape), out)
    torch.autograd.grad(padded.sum(), batch)


def test_a_shared_sample_is_repeated() -> None:
    """A batch of 1 stands for every sample, as without lengths."""
    mask = MASKS["causal"]()
    q, k = torch.randn(3, 2, 20, 8, dtype=F64), torch.randn(1, 2, 60, 8, dtype=F64)
    lens = numbers((60, 21, 33))
    found = sl.attention(q, k, k, mask, kv_lens=lens)
    whole = k.expand(3, -1, -1, -1)
    assert torch.equal(found, sl.attention(q, whole, whole, mask, kv_lens=lens))


def test_the_output_is_contiguous_and_the_operands_need_not_be() -> None:
    wide = torch.randn(100, 3, 4, 8, dtype=F64)
    q, k, v = wide.unbind(1)
    mask, cu = MASKS["causal"](), ends((60, 40))
    found = sl.attention(q, k, v, mask, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert found.is_contiguous()
    assert sl.attention(q, k, v[..., :3], mask, cu_seqlens_q=cu, cu_seqlens_k=cu).is_contiguous()
    copies = (t.contiguous() for t in (q, k, v))
    assert_close(found, sl.attention(*copies, mask, cu_seqlens_q=cu, cu_seqlens_k=cu))


def test_explain_and_trace() -> None:
    parts, mask = given(torch.float32), MASKS["causal"]()
    leaves = leaves_of(parts)
    said = sl.explain(sl.attention, *leaves, mask, **CU)
    assert said.kernel == "cpu"
    assert [plan.op for plan in said.ops] == ["block_attention", "block_attention_backward"]
    with sl.trace() as steps:
        sl.attention(*leaves, mask, **CU).sum().backward()
    assert [s.what for s in steps] == [plan.op for plan in said.ops]
    with pytest.raises(ValueError, match="cu_seqlens_q ends at 114"):
        sl.explain(sl.attention, *leaves, mask, cu_seqlens_q=ends((200,)), cu_seqlens_k=ends((60,)))


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_lengths_that_lie_reach_nothing_outside() -> None:
    """Nobody on the host looks at them: starts and lengths are clamped to the tensors."""
    draw = random.Random(0)
    mask = sl.sliding_window(LONGEST, block_size=16, window=20, device="cuda")
    wide = torch.full((3, 200, 2, 32), torch.nan, device="cuda")
    q, k, v = (t[50:150].normal_().requires_grad_() for t in wide)  # NaN before and after
    for _ in range(20):
        wrong = [draw.choice((0, 7, 60, 100, 101, -1, 2**31 - 1, -(2**31))) for _ in range(9)]
        cu = torch.tensor(wrong, dtype=torch.int32, device="cuda")
        out = sl.attention(q, k, v, mask, cu_seqlens_q=cu, cu_seqlens_k=cu.flip(0))
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(bool(t.isfinite().all()) for t in (out, *grads))


@pytest.mark.gpu
def test_other_lengths_compile_nothing_new() -> None:
    from sparse_layouts.kernels.block_attention.triton_backward_columns import (
        attention_backward_columns,
    )
    from sparse_layouts.kernels.block_attention.triton_backward_rows import attention_backward_rows
    from sparse_layouts.kernels.block_attention.triton_forward import attention_forward

    device = torch.cuda.current_device()
    kernels = (attention_forward, attention_backward_rows, attention_backward_columns)
    known = []
    for lengths in ((100, 28), (1,), (16,) * 16, (33, 1, 0, 64, 77)):
        mask = sl.causal(max(lengths), block_size=16, device="cuda")
        cu = ends(lengths).cuda()
        q = torch.randn(sum(lengths), 2, 64, device="cuda", requires_grad=True)
        sl.attention(q, q, q, mask, cu_seqlens_q=cu, cu_seqlens_k=cu).sum().backward()
        known.append([len(kernel.device_caches[device][0]) for kernel in kernels])
    assert known == known[:1] * len(known)


# --- the pieces of a Triton program ---------------------------------------------------------------


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, which is for Linux only")
def test_no_kernel_is_compiled_for_a_number_of_sequences() -> None:
    from sparse_layouts.kernels.block_attention import triton_backward_columns as columns
    from sparse_layouts.kernels.block_attention import triton_backward_rows as rows
    from sparse_layouts.kernels.block_attention import triton_forward as forward

    sizes = {"num_sequences", "num_queries", "num_keys", "mask_rows", "mask_columns", "num_tiles"}
    for kernel in (
        forward.attention_forward,
        rows.attention_backward_rows,
        columns.attention_backward_columns,
    ):
        assert sizes <= set(kernel.arg_names)
        assert sizes <= set(kernel.do_not_specialize)


def some_lengths(draw: random.Random, count: int, most: int) -> list[tuple[int, int]]:
    return [
        (draw.choice((0, 1, draw.randint(0, most))), draw.choice((0, draw.randint(0, most))))
        for _ in range(count)
    ]


def tiles_by_hand(pairs: list[tuple[int, int]], tile: int, mask: tuple[int, int]) -> Any:
    """(sequence, which of its tiles) of queries, and of keys."""
    of_queries, of_keys = [], []
    for b, (queries, keys) in enumerate(pairs):
        rows = [r for r in range(max(keys - queries, 0), keys) if r < mask[0]]
        touched = sorted({r // tile for r in rows})
        of_queries += [(b, i) for i in range(len(touched))]
        of_keys += [(b, i) for i in range(-(-min(keys, mask[1]) // tile))]
    return of_queries, of_keys


@pytest.mark.interpreter
@pytest.mark.parametrize("count", [0, 1, 5, 128, 150])
def test_a_program_finds_its_tile(count: int) -> None:
    from sparse_layouts.kernels.block_attention.triton_sequences import most_tiles
    from tests.kernels.small_kernels import tiles_found

    pairs = some_lengths(random.Random(count), count, 70)
    lengths = zip(*pairs, strict=True) if pairs else ((), ())
    sequences = packed_sequences(*(ends(tuple(n)) for n in lengths))
    rows = [sum(p[side] for p in pairs) for side in (0, 1)]
    tile, mask = 16, (60, 50)
    for by_key, expected in enumerate(tiles_by_hand(pairs, tile, mask)):
        programs = most_tiles(sequences, rows[by_key], tile, mask[by_key], aligned=bool(by_key))
        found = torch.full((programs + 1, 2), -1, dtype=torch.int32)
        tiles_found[(programs + 1,)](
            found, *sequences, count, *rows, *mask, TILE=tile, BY_KEY=bool(by_key)
        )
        assert len(expected) <= programs
        assert found[: len(expected)].tolist() == [list(pair) for pair in expected]
        assert bool((found[len(expected) :, 0] == count).all())


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, which is for Linux only")
@pytest.mark.parametrize("seed", range(40))
def test_there_is_a_program_for_every_tile(seed: int) -> None:
    from sparse_layouts.kernels.block_attention.triton_sequences import most_tiles

    draw = random.Random(seed)
    pairs, tile = some_lengths(draw, draw.randint(1, 30), 200), draw.choice((16, 64))
    mask = (draw.randint(1, 250), draw.randint(1, 250))
    if seed == 0:  # as many tiles as there can be: each sequence has a row in two of them
        pairs, mask = [(2, tile + 1)] * 20, (250, 250)
    of_queries, of_keys = tiles_by_hand(pairs, tile, mask)
    packed = packed_sequences(*(ends(n) for n in zip(*pairs, strict=True)))
    rows = [sum(p[side] for p in pairs) for side in (0, 1)]
    assert len(of_queries) <= most_tiles(packed, rows[0], tile, mask[0], aligned=False)
    assert len(of_keys) <= most_tiles(packed, rows[1], tile, mask[1], aligned=True)
    longest = [max(p[side] for p in pairs) for side in (0, 1)]
    q, k = (torch.empty(len(pairs), 1, n, 1) for n in longest)
    padded = padded_sequences(q, k, len(pairs), None, None, None)
    for of_all, side, aligned in ((of_queries, 0, False), (of_keys, 1, True)):
        of_one = max((i + 1 for _, i in of_all), default=0)
        assert of_one <= most_tiles(padded, longest[side], tile, mask[side], aligned)


@pytest.mark.interpreter
@pytest.mark.parametrize("gather", [1, 2])
@pytest.mark.parametrize(
    ("plain", "total"), [(0, 0), (0, 3), (2, 2), (5, 9), (270, 300), (20, 700)]
)
def test_a_program_finds_its_chunks(plain: int, total: int, gather: int) -> None:
    from tests.kernels.small_kernels import chunks_found

    draw, block = random.Random(total), 16
    lists = [sorted(draw.sample(range(2000), n * gather)) for n in (plain, total - plain)]
    columns = torch.tensor([7, *lists[0], *lists[1], *[-1] * gather], dtype=torch.int32)
    wanted = ((0, 10**6), (0, 500), (5000, 5001), (16 * 31, 16 * 900 + 3), (9, 9), (40, 0))
    for first, end in wanted:
        found = torch.full((total + 3,), -1, dtype=torch.int32)
        chunks_found[(1,)](found, columns, 1, plain, total, first, end, BLOCK=block, GATHER=gather)
        num_plain, num = found[:2].tolist()
        visited = found[2 : 2 + num].tolist()
        assert all(c < plain for c in visited[:num_plain])
        assert all(plain <= c < total for c in visited[num_plain:])
        assert len(set(visited)) == num
        needed = {
            i // gather
            for i, column in enumerate((*lists[0], *lists[1]))
            if column * block < end and (column + 1) * block > first and first < end
        }
        assert needed <= set(visited)
        # one more than needed at the front of each part, at most
        assert num <= len(needed) + 2
