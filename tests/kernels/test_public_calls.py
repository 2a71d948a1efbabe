"""The ops as users call them: results and gradients, no dense fallback; on a GPU also compiled,
captured and without waiting.

The dense computation in float64 is the measuring stick, dense torch in the same dtype says how
wrong a result may be.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.kernels.requirements import HOPPER_WORKSPACE_BYTES
from tests.kernels.accuracy import check_result, norms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


class Example(NamedTuple):
    """A call: `sparse(*leaves)`, what `dense` computes with the densified leaves, and the output's
    gradient.
    """

    leaves: list[Tensor]
    sparse: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    gradient: Tensor


def normal(*shape: int, like: Tensor) -> Tensor:
    """Standard normal in `like`'s dtype, on its device."""
    return torch.randn(*shape, dtype=torch.float64).to(like)


def dense_of(t: Tensor) -> Tensor:
    """A plain tensor, whatever `t` is."""
    return t.to_dense() if isinstance(t, sl.LayoutTensor) else t


def weight(like: Tensor) -> sl.BSRTensor:
    """256 x 320, 40% of its blocks stored."""
    return sl.bsr(normal(256, 320, like=like), block_size=64, keep=sl.Magnitude(density=0.4))


def matmul(like: Tensor) -> Example:
    leaves = [weight(like), normal(320, 72, like=like)]
    return Example(leaves, torch.matmul, torch.matmul, normal(256, 72, like=like))


def batched_matmul_from_the_right(like: Tensor) -> Example:
    leaves = [normal(3, 50, 256, like=like), weight(like)]
    return Example(leaves, torch.matmul, torch.matmul, normal(3, 50, 320, like=like))


def linear(like: Tensor) -> Example:
    leaves = [normal(2, 40, 320, like=like), weight(like), normal(256, like=like)]
    return Example(leaves, F.linear, F.linear, normal(2, 40, 256, like=like))


def softmax(like: Tensor) -> Example:
    w = weight(like)
    stored = dense_of(w) != 0

    def sparse(w: Tensor) -> Tensor:
        return torch.softmax(w, -1).to_dense()

    def dense(w: Tensor) -> Tensor:
        return torch.softmax(w.masked_fill(~stored, -torch.inf), -1).nan_to_num(0.0)

    return Example([w], sparse, dense, normal(256, 320, like=like))


def sddmm(like: Tensor) -> Example:
    mask = sl.causal(300, block_size=32, device=like.device)
    stored = mask.to_dense()

    def sparse(a: Tensor, b: Tensor) -> Tensor:
        return sl.sddmm(a, b.mT, mask).to_dense()

    def dense(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT) * stored

    leaves = [normal(300, 48, like=like), normal(300, 48, like=like)]
    return Example(leaves, sparse, dense, normal(300, 300, like=like))


def scaled_dot_product_attention(like: Tensor) -> Example:
    mask = sl.sliding_window(300, block_size=64, window=90, device=like.device)
    stored = mask.to_dense()

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=stored)

    leaves = [normal(2, 300, 2, 64, like=like).transpose(1, 2) for _ in range(3)]
    return Example(leaves, sparse, dense, normal(2, 2, 300, 64, like=like))


def attention(like: Tensor) -> Example:
    """Grouped heads, a pattern per head, fewer queries than keys."""
    mask = sl.local_stride(
        384, block_size=64, local_blocks=2, vert_stride=3, num_heads=4, device=like.device
    )
    stored = mask.to_dense()[:, -150:]

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sl.attention(q, k, v, mask, scale=0.2)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=stored, scale=0.2, enable_gqa=True)

    q, k, v = (normal(2, h, n, 80, like=like) for h, n in ((4, 150), (2, 384), (2, 384)))
    return Example([q, k, v], sparse, dense, normal(2, 4, 150, 80, like=like))


def biased_attention_lse(like: Tensor) -> Example:
    """The logsumexp, with a bias that is itself a layout."""
    mask = sl.causal(200, block_size=32, device=like.device)
    stored = mask.to_dense()

    def sparse(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        return sl.attention(q, k, k, mask, bias=bias, return_lse=True)[1]

    def dense(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        scores = (q @ k.mT) / 64**0.5 + bias
        return scores.masked_fill(~stored, -torch.inf).logsumexp(-1)

    bias = sl.sddmm(normal(200, 16, like=like), normal(16, 200, like=like), mask)
    q, k = (normal(1, 2, 200, 64, like=like) for _ in range(2))
    accumulator = like.to(torch.promote_types(like.dtype, torch.float32))
    return Example([q, k, bias], sparse, dense, normal(1, 2, 200, like=accumulator))


def packed_attention(like: Tensor) -> Example:
    """Sequences one after another, one of them a chunk whose past the block does not divide."""
    mask = sl.local_stride(
        200, block_size=32, local_blocks=2, vert_stride=3, num_heads=4, device=like.device
    )
    stored = mask.to_dense()
    queries, keys = (200, 50, 0, 1, 37), (200, 87, 0, 65, 37)
    ends = [
        torch.tensor([0, *lengths], device=like.device).cumsum(0) for lengths in (queries, keys)
    ]

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sl.attention(q, k, v, mask, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for rows, *kv in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
            own = stored[:, : len(kv[0]), : len(kv[0])][:, len(kv[0]) - len(rows) :]
            heads = (t.transpose(0, 1)[None] for t in (rows, *kv))
            out = F.scaled_dot_product_attention(*heads, attn_mask=own, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    q, k, v = (normal(n, h, 48, like=like) for n, h in ((288, 4), (389, 2), (389, 2)))
    return Example([q, k, v], sparse, dense, normal(288, 4, 48, like=like))


def padded_attention(like: Tensor) -> Example:
    """Keys padded from the left, queries from the right."""
    mask = sl.sliding_window(128, block_size=64, window=70, device=like.device)
    stored = mask.to_dense()
    lengths = {"q_lens": (100, 9, 60), "kv_lens": (120, 128, 60), "kv_starts": (10, 2, 70)}
    given = {
        name: torch.tensor(numbers, dtype=torch.int32, device=like.device)
        for name, numbers in lengths.items()
    }

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sl.attention(q, k, v, mask, **given)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for b, (rows, keys, start) in enumerate(zip(*lengths.values(), strict=True)):
            kv = (t[b, :, start : start + keys] for t in (k, v))
            own = stored[:keys, :keys][keys - rows :]
            out = F.scaled_dot_product_attention(q[b, :, :rows], *kv, attn_mask=own)
            outs.append(F.pad(out, (0, 0, 0, q.shape[2] - rows)))
        return torch.stack(outs)

    q, k, v = (normal(3, 2, n, 64, like=like) for n in (100, 130, 130))
    return Example([q, k, v], sparse, dense, normal(3, 2, 100, 64, like=like))


EXAMPLES = [
    matmul,
    batched_matmul_from_the_right,
    linear,
    softmax,
    sddmm,
    scaled_dot_product_attention,
    attention,
    biased_attention_lse,
    packed_attention,
    padded_attention,
]
examples = pytest.mark.parametrize("make", EXAMPLES, ids=lambda make: make.__name__)


def ready(leaves: list[Tensor]) -> list[Tensor]:
    """The leaves, asking for gradients."""
    return [t.detach().requires_grad_() for t in leaves]


def forward_and_backward(
    call: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor
) -> list[Tensor]:
    """The output and every leaf's gradient."""
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype), allow_unused=True)]


def dense_results(example: Example, dtype: torch.dtype) -> list[Tensor]:
    """The dense computation in a dtype; a layout's gradient has zeros where nothing is stored."""
    leaves = ready([dense_of(t.detach()).to(dtype) for t in example.leaves])
    out, *grads = forward_and_backward(example.dense, leaves, example.gradient)
    masked = [
        g * (dense_of(t.detach()) != 0) if isinstance(t, sl.LayoutTensor) else g
        for g, t in zip(grads, example.leaves, strict=True)
    ]
    return [out, *masked]


def check(example: Example, results: list[Tensor]) -> None:
    """Compares an output and gradients with the dense computation in float64."""
    dtype = example.leaves[0].dtype
    working = torch.float32 if dtype == torch.float64 else dtype
    unit = torch.finfo(dtype).eps / torch.finfo(working).eps
    exact = dense_results(example, torch.float64)
    dense = dense_results(example, working)
    for i, (got, stick, in_dtype) in enumerate(zip(results, exact, dense, strict=True)):
        stick = stick.detach()
        lost = {kind: unit * e for kind, e in norms(in_dtype.detach().double() - stick).items()}
        check_result(f"result {i}", dense_of(got.detach()), stick, lost)


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """A dense fallback is an error."""
    with sl.fallback("error"):
        yield


@examples
@pytest.mark.parametrize("device", DEVICES)
def test_results_and_gradients(make: Callable[[Tensor], Example], device: str) -> None:
    for dtype in DTYPES[device]:
        example = make(torch.empty(0, dtype=dtype, device=device))
        leaves = ready(example.leaves)
        results = forward_and_backward(example.sparse, leaves, example.gradient)
        for gradient, leaf in zip(results[1:], leaves, strict=True):
            assert type(gradient) is type(leaf)
        check(example, results)


# Inductor's advice on float32 products, and what it imports
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.gpu
@examples
def test_compiled(make: Callable[[Tensor], Example]) -> None:
    torch._dynamo.reset()
    example = make(torch.empty(0, device="cuda"))
    compiled = torch.compile(example.sparse, fullgraph=True)
    check(example, forward_and_backward(compiled, ready(example.leaves), example.gradient))


@contextmanager
def host_syncs_raise() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch says once a process that the mode is a prototype
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_the_check_for_host_syncs_is_red_for_one() -> None:
    with host_syncs_raise(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device="cuda").sum().item()


@pytest.mark.gpu
@examples
def test_a_warm_call_does_not_wait_for_the_gpu(make: Callable[[Tensor], Example]) -> None:
    example = make(torch.empty(0, dtype=torch.bfloat16, device="cuda"))
    leaves = ready(example.leaves)
    forward_and_backward(example.sparse, leaves, example.gradient)
    with host_syncs_raise():
        results = forward_and_backward(example.sparse, leaves, example.gradient)
    check(example, results)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@examples
def test_captured_in_a_cuda_graph(make: Callable[[Tensor], Example]) -> None:
    example = make(torch.empty(0, dtype=torch.bfloat16, device="cuda"))
    leaves = ready(example.leaves)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward_and_backward(example.sparse, leaves, example.gradient)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(example.sparse, leaves, example.gradient)
    # other numbers in the same places
    plain = [leaf for leaf in leaves if type(leaf) is Tensor]
    with torch.no_grad():
        for leaf in plain:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    torch.cuda.synchronize()
    eager = forward_and_backward(example.sparse, leaves, example.gradient)
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(dense_of(a.detach()), dense_of(b.detach()))


def peak_bytes(call: Callable[[], Any]) -> int:
    """What a warm call allocates at most beyond what was there."""
    call()
    gc.collect()  # what earlier tests left would be freed within the call
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_memory_of_attention_is_linear_in_its_length() -> None:
    peaks = {}
    for n in (16384, 32768):
        mask = sl.sliding_window(n, block_size=64, window=1024, device="cuda")
        q, k, v, dout = (
            torch.randn(1, 8, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(4)
        )

        def step(mask: Any = mask, leaves: Any = (q, k, v), dout: Tensor = dout) -> None:
            out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
            torch.autograd.grad(out, leaves, dout.detach())

        peaks[n] = peak_bytes(step)
        operand = q.numel() * q.element_size()
        # out, dq, dk, dv, copies in float32, and the workspace of the backward on Hopper: stored
        # scores, blocks whole, in groups of two columns; all scores would be n / 64 operands
        stored = 8 * (n // 64) * (1024 // 64 + 2) * 64 * 64 * q.element_size()
        allowed = 16 * operand + min(stored, HOPPER_WORKSPACE_BYTES)
        assert peaks[n] <= allowed, f"{peaks[n]} bytes, an operand has {operand}"
    assert peaks[32768] <= 2.2 * peaks[16384]
