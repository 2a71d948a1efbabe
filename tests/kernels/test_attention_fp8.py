"""Attention in 8 bits as users call it: what the quantiser keeps, results, and what is refused.

Kernels have their cases in `cases_attention_fp8.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch import Facts
from sparse_layouts.dispatch.kernel_table import KERNELS
from sparse_layouts.kernels import block_attention_fp8, requirements
from sparse_layouts.kernels.block_attention import heads
from sparse_layouts.kernels.block_attention_fp8 import OP, quantize, triton_forward
from sparse_layouts.kernels.block_attention_fp8.quantize import E4M3, ROWS_PER_SCALE, SMALLEST_SCALE
from sparse_layouts.measuring import relative_error
from tests.kernels.accuracy import check_call
from tests.kernels.cases import Call
from tests.kernels.test_public_calls import host_syncs_raise
from tests.kernels.test_recall import on_hopper

FP8 = sl.FP8Operand
LARGEST = 448.0
TENSOR_CORES = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
        reason="tensor cores multiply e4m3 from compute capability 8.9 on",
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=TENSOR_CORES)]
on_devices = pytest.mark.parametrize("device", DEVICES)
on_gpu = pytest.mark.parametrize("device", DEVICES[1:])


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """A dense fallback is an error."""
    with sl.fallback("error"):
        yield


def normal(
    *shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", keys: bool = False
) -> Tensor:
    """Standard normal; `keys`: with a mean in every channel."""
    x = torch.randn(*shape)
    if keys:
        x += 3 * torch.randn(shape[-1])
    return x.to(device, dtype)


# --- quantising -----------------------------------------------------------------------------------


def assert_rounded(operand: FP8, given: Tensor) -> None:
    """Every number is within half a step of e4m3 of what it was made of, and the scales are the
    smallest powers of two that leave room for the largest.
    """
    data, scale, shift = operand.four_dimensional()
    x = quantize_input(given, operand)
    x = x if shift is None else x - shift
    by_row = quantize.by_row(scale, x.shape[2])
    step = torch.maximum(x.abs() / 16, by_row * 2**-10)
    assert bool(((data.float() * by_row - x).abs() <= step).all())
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    largest = (x.abs() / by_row).nan_to_num(0.0)
    assert bool((largest <= LARGEST).all())
    by_column = scale.shape[-1] > 1
    blocks = F.pad(largest, (0, 0, 0, -largest.shape[2] % ROWS_PER_SCALE))
    blocks = blocks.unflatten(2, (-1, ROWS_PER_SCALE))
    peaks = largest.amax(2) if by_column else blocks.amax((3, 4))
    assert bool((peaks > LARGEST / 2).all())


def quantize_input(given: Tensor, operand: FP8) -> Tensor:
    """The tensor in fp32 and four dimensions."""
    x = given.float()
    return x.transpose(0, 1)[None] if operand.packed else x[(None,) * (4 - x.dim())]


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 300, 64), (3, 129, 80), (40, 128), (1, 1, 1, 1)])
def test_numbers_are_rounded_once(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, poisoned_empty: None
) -> None:
    q, k, v = (normal(*shape, dtype=dtype, device=device, keys=i == 1) for i in range(3))
    operands = sl.quantize_fp8(q, k, v)
    for given, operand in zip((q, k, v), operands, strict=True):
        assert operand.data.dtype == E4M3
        assert operand.data.shape == shape
        assert operand.dequantize().shape == shape
        assert operand.dequantize().dtype == operand.dtype == dtype
        assert (operand.shift is None) == (operand is not operands[1])
        if shape[-1] > 1:
            assert_rounded(operand, given)
    assert operands[0].data.stride(-1) == 1
    assert operands[2].data.stride(-2) == 1  # by column
    for i, lines in enumerate((operands[0].data, operands[1].data, operands[2].data.mT)):
        ends = lines.stride()[:-1]
        assert all(stride % 16 == 0 for stride in ends), f"operand {i}: {ends}"


@on_devices
def test_rows_of_packed_sequences(device: str) -> None:
    x = normal(300, 2, 64, device=device, keys=True)
    plain = sl.quantize_fp8(*(x.transpose(0, 1)[None],) * 3)
    packed = sl.quantize_fp8(x, x, x, packed=True)
    for a, b in zip(plain, packed, strict=True):
        assert b.data.shape == (300, 2, 64)
        for one, other in zip(a.four_dimensional(), b.four_dimensional(), strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.equal(one.float(), other.float())
        assert torch.equal(b.dequantize(), a.dequantize()[0].transpose(0, 1))


@on_devices
def test_small_large_and_no_numbers(device: str) -> None:
    for value in (0.0, 1e-38, 2.0**-70):
        x = torch.full((1, 1, 130, 32), value, device=device)
        for operand in sl.quantize_fp8(x, x, x, smooth_k=False):
            assert bool((operand.scale == SMALLEST_SCALE).all())
            assert_close_to(operand.dequantize(), x, SMALLEST_SCALE * 2**-10)
    x = torch.full((1, 1, 130, 32), 3e38, device=device)
    for operand in sl.quantize_fp8(x, x, x, smooth_k=False):
        assert_close_to(operand.dequantize(), x, 3e38 / 16)
    for shape in ((1, 2, 0, 32), (0, 2, 40, 32), (1, 2, 40, 0)):
        for operand in sl.quantize_fp8(*(torch.zeros(shape, device=device),) * 3):
            assert operand.data.shape == operand.dequantize().shape == shape


def assert_close_to(found: Tensor, expected: Tensor, most: float) -> None:
    assert bool(((found - expected).abs() <= most).all())


@on_devices
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_with_what_shares_a_scale(value: float, device: str) -> None:
    x = normal(1, 2, 300, 32, device=device)
    x[0, 1, 130, 5] = -value
    q, k, v = sl.quantize_fp8(x, x, x, smooth_k=False)
    for operand in (q, k):
        hit = operand.dequantize().isnan()
        assert bool(hit[0, 1, ROWS_PER_SCALE : 2 * ROWS_PER_SCALE].all())
        assert int(hit.sum()) == ROWS_PER_SCALE * 32
    hit = v.dequantize().isnan()
    assert bool(hit[0, 1, :, 5].all())
    assert int(hit.sum()) == 300


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
def test_the_kernel_gives_torchs_bits(
    dtype: torch.dtype, by_column: bool, shift: bool, device: str, poisoned_empty: None
) -> None:
    if shift and by_column:
        pytest.skip("values have no shift")
    for shape in (
        (2, 3, 300, 64),
        (1, 2, 129, 80),
        (1, 1, 16, 128),
        (2, 1, 260, 256),
        (1, 1, 1, 1),
    ):
        whole = normal(*shape, dtype=dtype, device=device, keys=True)
        whole[0, 0, 0, 0] = LARGEST * 4
        broken = whole.clone()
        broken[-1, -1, -1, -1] = -math.nan
        views = (whole.mT.contiguous().mT, whole[:, :, ::2], whole * -(2.0**-90))
        for x in (whole, *views, broken):
            mean = x.mean(2, keepdim=True, dtype=torch.float32) if shift else None
            found = quantize.quantize_op(x, mean, by_column)
            expected = quantize.quantize(x, mean, by_column)
            for a, b in zip(found, expected, strict=True):
                assert a.shape == b.shape
                assert torch.equal(a.float().nan_to_num(1e9), b.float().nan_to_num(1e9))


# --- attention ------------------------------------------------------------------------------------


class Given(NamedTuple):
    """A call of the public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: sl.BSRTensor


def square(device: str) -> Given:
    x = [normal(2, 2, 300, 64, device=device, keys=i == 1) for i in range(3)]
    return Given(*x, sl.sliding_window(300, block_size=64, window=90, device=device))


def fewer_queries_and_kv_heads(device: str) -> Given:
    mask = sl.local_stride(
        500, block_size=64, local_blocks=2, vert_stride=3, num_heads=4, device=device
    )
    kv = [normal(1, 2, 500, 128, device=device, keys=i == 0) for i in range(2)]
    return Given(normal(1, 4, 333, 128, device=device), *kv, mask)


def more_keys_than_queries(device: str) -> Given:
    """Rows without a key: rows 40 to 79, and a block row."""
    stored = torch.rand(260, 390) < 0.3
    stored[40:80] = stored[128:192] = False
    kv = [normal(2, 1, 390, 128, device=device) for _ in range(2)]
    mask = sl.mask_from(stored.to(device), 64)
    return Given(normal(2, 3, 260, 128, device=device), *kv, mask)


def small_blocks(device: str) -> Given:
    x = [normal(1, 2, 200, 80, device=device, dtype=torch.float16) for _ in range(3)]
    return Given(*x, sl.causal(200, block_size=16, device=device))


def counted(device: str) -> Given:
    x = [normal(1, 2, 320, 64, device=device, dtype=torch.float32) for _ in range(3)]
    return Given(*x, sl.bigbird(320, block_size=32, num_heads=2, source="hf-eval", device=device))


def large_blocks(device: str) -> Given:
    x = [normal(1, 2, 700, 128, device=device, keys=i == 1) for i in range(3)]
    return Given(*x, sl.causal(700, block_size=128, device=device))


CALLS = [square, fewer_queries_and_kv_heads, more_keys_than_queries, small_blocks, counted]
CALLS += [large_blocks]
calls = pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)


def as_call(q: FP8, k: FP8, v: FP8, mask: sl.BSRTensor) -> Call:
    """What the op's reference gets for operands."""
    (q8, q_scale, _), (k8, k_scale, k_shift), (v8, v_scale, _) = (
        t.four_dimensional() for t in (q, k, v)
    )
    pattern = mask.block_pattern
    given = (q8, k8, v8, q_scale, k_scale, v_scale, k_shift, pattern)
    how = {"scale": 1.0 / math.sqrt(q8.shape[-1]), "dtype": q.dtype, "sequences": None}
    return Call((*given, heads.list_of_head(pattern, q8.shape[1])), how)


@on_devices
@calls
@pytest.mark.parametrize("smooth_k", [False, True], ids=["plain", "smooth"])
def test_results(
    make: Callable[[str], Given], smooth_k: bool, device: str, poisoned_empty: None
) -> None:
    *operands, mask = make(device)
    quantised = sl.quantize_fp8(*operands, smooth_k=smooth_k)
    out, lse = sl.attention(*quantised, mask, return_lse=True)
    check_call(OP, as_call(*quantised, mask), (out, lse))
    assert out.dtype == operands[0].dtype
    assert torch.equal(sl.attention(*quantised, mask), out)  # the same bits
    empty = ~mask.to_dense().any(-1)
    if mask.dim() == 2 and bool(empty.any()):
        assert not bool(out[:, :, empty].any())
        assert bool(lse[:, :, empty].isneginf().all())


def rounding_of_e4m3() -> float:
    """How much normal numbers lose of themselves, in the root mean square."""
    x = torch.randn(100_000)
    return relative_error(x.to(E4M3).float(), x)


@on_devices
def test_the_loss_against_what_was_quantised_is_that_of_e4m3(device: str) -> None:
    q, k, v = (normal(1, 4, 1024, 128, device=device) for _ in range(3))
    mask = sl.causal(1024, block_size=64, device=device)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    out = sl.attention(*sl.quantize_fp8(q, k, v), mask)
    in_bf16 = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # q, k, v and the probabilities are rounded, each by itself; a score of normal operands at the
    # default scale is about 1, so that what it loses is what its probability loses
    unit = rounding_of_e4m3()
    assert relative_error(in_bf16, exact) < unit / 4
    assert unit < relative_error(out, exact) < 1.25 * math.sqrt(4) * unit


@on_devices
def test_a_mean_of_the_keys_costs_nothing_once_it_is_subtracted(device: str) -> None:
    q, k, v = (normal(1, 2, 512, 64, device=device) for _ in range(3))
    k = k + 6 * normal(64, device=device)
    mask = sl.causal(512, block_size=64, device=device)
    scores = q.double() @ k.double().mT / 8
    scores = scores.masked_fill(~mask.to_dense(), -torch.inf)
    exact, exact_lse = scores.softmax(-1) @ v.double(), scores.logsumexp(-1)
    errors, of_lse = {}, {}
    for smooth_k in (False, True):
        quantised = sl.quantize_fp8(q, k, v, smooth_k=smooth_k)
        out, lse = sl.attention(*quantised, mask, return_lse=True)
        errors[smooth_k] = relative_error(out, exact)
        of_lse[smooth_k] = relative_error(lse, exact_lse)
        assert torch.equal(sl.attention(*quantised, mask), out)
    assert errors[True] < errors[False] / 2
    assert of_lse[True] < of_lse[False]
    assert of_lse[True] < rounding_of_e4m3()


@on_devices
def test_fewer_dimensions_and_one_sample_for_all(device: str) -> None:
    mask = sl.causal(200, block_size=32, device=device)
    q, k, v = sl.quantize_fp8(*(normal(1, 1, 200, 64, device=device) for _ in range(3)))
    whole = sl.attention(q, k, v, mask)
    q3, k3, v3 = (
        FP8(t.data[0], t.scale[0], None if t.shift is None else t.shift[0], t.dtype)
        for t in (q, k, v)
    )
    assert torch.equal(sl.attention(q3, k3, v3, mask), whole[0])
    q2, k2, v2 = sl.quantize_fp8(*(t.dequantize()[0, 0] for t in (q, k, v)), smooth_k=False)
    out, lse = sl.attention(q2, k2, v2, mask, return_lse=True)
    assert out.shape == (200, 64)
    assert lse.shape == (200,)
    more = sl.quantize_fp8(normal(3, 1, 200, 64, device=device), k, v)
    out = sl.attention(*more, mask)
    assert out.shape == (3, 1, 200, 64)
    alone = sl.attention(sl.FP8Operand(more[0].data[1:2], more[0].scale[1:2]), k, v, mask)
    assert torch.equal(out[1:2], alone)


@on_devices
def test_keys_of_a_prompt_serve_every_step(device: str) -> None:
    mask = sl.sliding_window(320, block_size=32, window=70, device=device)
    q, k, v = (normal(1, 2, 320, 64, device=device) for _ in range(3))
    first = sl.quantize_fp8(q, k, v)
    step = sl.quantize_fp8(q[:, :, -1:], first[1], first[2])
    assert step[1] is first[1]
    assert step[2] is first[2]
    whole, last = sl.attention(*first, mask), sl.attention(*step, mask)
    # the last query is rounded with another scale, and fp32 sums differ: all is within bf16 of it
    # but for what e4m3 loses
    assert relative_error(last, whole[:, :, -1:].double()) < 3 * rounding_of_e4m3()


LENGTHS = (130, 0, 64, 1, 190)


@on_devices
def test_sequences_equal_each_alone(device: str) -> None:
    longest = max(LENGTHS)
    mask = sl.sliding_window(longest, block_size=32, window=60, device=device)
    lengths = torch.tensor(LENGTHS, device=device)
    ends = F.pad(lengths.cumsum(0), (1, 0))
    q = normal(sum(LENGTHS), 4, 64, device=device)
    k, v = (normal(sum(LENGTHS), 2, 64, device=device, keys=i == 0) for i in range(2))
    packed = sl.quantize_fp8(q, k, v, packed=True)
    out, lse = sl.attention(*packed, mask, cu_seqlens_q=ends, cu_seqlens_k=ends, return_lse=True)
    assert out.shape == q.shape
    # what the operands stand for, in float64, each sequence by dense attention
    exact = [t.double() for t in map(stands_for, packed)]
    dense, of_lse = torch.zeros_like(exact[0]), torch.zeros(4, sum(LENGTHS), dtype=torch.float64)
    stored = mask.to_dense()
    for begin, n in zip(ends.tolist(), LENGTHS, strict=False):
        if n:
            own_q, own_k, own_v = (t[begin : begin + n].transpose(0, 1) for t in exact)
            scores = own_q @ own_k.repeat_interleave(2, 0).mT / 8
            scores = scores.masked_fill(~stored[:n, :n], -torch.inf)
            own = scores.softmax(-1) @ own_v.repeat_interleave(2, 0)
            dense[begin : begin + n] = own.transpose(0, 1)
            of_lse[:, begin : begin + n] = scores.logsumexp(-1).cpu()
    # at most the probabilities are rounded to e4m3, by a sixteenth each
    assert relative_error(out, dense) < 1 / 16
    # products lose 13 bits of the largest, one of q 4 to 5 times its size by one of k
    assert bool(((lse.cpu().double() - of_lse).abs() < 0.05).all())

    # padded on the right gives each sequence the same numbers, where scales are the same
    pad = [torch.zeros(len(LENGTHS), h, longest, 64, device=device).bfloat16() for h in (4, 2, 2)]
    for i, (begin, n) in enumerate(zip(ends.tolist(), LENGTHS, strict=False)):
        for whole, t in zip(pad, (q, k, v), strict=True):
            whole[i, :, :n] = t[begin : begin + n].transpose(0, 1)
    padded = sl.attention(*sl.quantize_fp8(*pad), mask, q_lens=lengths, kv_lens=lengths)
    for i, (begin, n) in enumerate(zip(ends.tolist(), LENGTHS, strict=False)):
        assert not bool(padded[i, :, n:].any())
        found = padded[i, :, :n].transpose(0, 1)
        if n:
            # the mean of the keys is another, with zeros in the padding: that rounds them anew
            assert relative_error(found, dense[begin : begin + n]) < 6 * rounding_of_e4m3()


def stands_for(t: FP8) -> Tensor:
    """An operand's numbers in fp32, exactly."""
    return t._replace(dtype=torch.float32).dequantize()


# --- what is refused ------------------------------------------------------------------------------


def three(**how: Any) -> tuple[FP8, FP8, FP8]:
    """Operands (1, 2, 64, 32)."""
    return sl.quantize_fp8(*(normal(1, 2, 64, 32) for _ in range(3)), **how)


MASK = sl.causal(64, block_size=16)


def with_bias(q: FP8, k: FP8, v: FP8) -> None:
    sl.attention(q, k, v, MASK, bias=sl.bsr(torch.ones(64, 64), block_size=16))


def a_gradient(q: FP8, k: FP8, v: FP8) -> None:
    sl.attention(q._replace(scale=q.scale.clone().requires_grad_()), k, v, MASK)


def another_scale(q: FP8, k: FP8, v: FP8) -> None:
    sl.attention(q, k._replace(scale=k.scale.expand(1, 2, 2, 1)), v, MASK)


def scales_in_bf16(q: FP8, k: FP8, v: FP8) -> None:
    sl.attention(q, k, v._replace(scale=v.scale.bfloat16()), MASK)


def numbers_in_e5m2(q: FP8, k: FP8, v: FP8) -> None:
    sl.attention(q._replace(data=q.data.float().to(torch.float8_e5m2)), k, v, MASK)


REFUSED: dict[str, tuple[Callable[[FP8, FP8, FP8], Any], type[Exception], str]] = {
    "bias": (with_bias, NotImplementedError, "take no bias, got a bias; pass q, k and v in bf"),
    "dropout": (
        lambda q, k, v: sl.attention(q, k, v, MASK, dropout_p=0.1),
        NotImplementedError,
        "take no dropout",
    ),
    "gradient": (a_gradient, NotImplementedError, "q asks for a gradient, .* torch.no_grad"),
    "one of three": (
        lambda q, k, v: sl.attention(q, k.dequantize(), v, MASK),
        TypeError,
        "q, k and v all in 8 bits or none, got k as Tensor; q, k, v = sl.quantize_fp8",
    ),
    "lengths of plain operands": (
        lambda q, k, v: sl.attention(q, k, v, MASK, cu_seqlens_q=ENDS, cu_seqlens_k=ENDS),
        ValueError,
        r"q quantised with packed=True with cu_seqlens_q .* got packed=False",
    ),
    "dense mask": (
        lambda q, k, v: sl.attention(q, k, v, MASK.to_dense()),
        TypeError,
        "expected a block mask",
    ),
    "heads": (
        lambda q, k, v: sl.attention(
            q, k._replace(data=k.data[:, :1].expand(1, 3, 64, 32)), v, MASK
        ),
        ValueError,
        "heads",
    ),
    "scales": (
        another_scale,
        ValueError,
        r"expected k.scale to be, .* \(1, 2, 1, 1\), got \(1, 2, 2",
    ),
    "dtype of scales": (scales_in_bf16, TypeError, r"v.scale is torch.float32, got torch.bfloat16"),
    "dtype of numbers": (numbers_in_e5m2, TypeError, r"q.data is torch.float8_e4m3fn, got .*e5m2"),
    "dtype of the result": (
        lambda q, k, v: sl.attention(q._replace(dtype=torch.float64), k, v, MASK),
        TypeError,
        "q.dtype is bfloat16, float16 or float32, got torch.float64",
    ),
    "shift of q": (
        lambda q, k, v: sl.attention(q._replace(shift=k.shift), k, v, MASK),
        ValueError,
        "q has a shift, which only k may have",
    ),
    "shape of a shift": (
        lambda q, k, v: sl.attention(q, k._replace(shift=k.shift[..., :4]), v, MASK),
        ValueError,
        r"expected k.shift to be, .* \(1, 2, 1, 32\), got \(1, 2, 1, 4\)",
    ),
}
ENDS = torch.tensor([0, 64])


@pytest.mark.parametrize("name", REFUSED)
def test_attention_refuses(name: str) -> None:
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call(*three())


def test_quantising_refuses() -> None:
    x = normal(1, 2, 64, 32)
    with pytest.raises(TypeError, match=r"k is bfloat16, float16 or float32, got torch.float64"):
        sl.quantize_fp8(x, x.double(), x)
    with pytest.raises(TypeError, match="v is a dense tensor or FP8Operand, got BSRTensor"):
        sl.quantize_fp8(x, x, sl.bsr(torch.eye(64), block_size=16))
    with pytest.raises(ValueError, match=r"packed q is \(T, H, D\).* got shape \(1, 2, 64, 32\)"):
        sl.quantize_fp8(x, x, x, packed=True)
    with pytest.raises(ValueError, match=r"q is \(B, H, N, D\).* got shape \(1, 1, 2, 64, 32\)"):
        sl.quantize_fp8(x[None], x, x)
    with pytest.raises(ValueError, match="k was quantised with packed=False, expected packed=True"):
        sl.quantize_fp8(x[0], three()[1], x[0], packed=True)
    with pytest.raises(NotImplementedError, match=r"v asks for a gradient, .* pass bfloat16"):
        sl.quantize_fp8(x, x, x.clone().requires_grad_())
    with torch.no_grad():
        sl.quantize_fp8(x, x, x.clone().requires_grad_())


def test_numbers_in_8_bits_without_scales_are_refused() -> None:
    q, k, v = three()
    with pytest.raises(TypeError, match=r"q in torch.float8_e4m3fn has no scale; .*quantize_fp8"):
        sl.attention(q.data, k.data, v.data, MASK)
    with pytest.raises(TypeError, match=r"q in torch.float8_e4m3fn has no scale; .*quantize_fp8"):
        F.scaled_dot_product_attention(q.data, k.data, v.data, attn_mask=MASK)


# --- which kernel ---------------------------------------------------------------------------------


def test_explained() -> None:
    q, k, v = three()
    text = str(sl.explain(sl.attention, q, k, v, MASK))
    assert "block_attention_fp8" in text
    assert "dequantized" in text
    assert "FP8Operand(" in text
    assert "block_attention" in text.replace("block_attention_fp8", "")
    with sl.trace() as steps:
        sl.attention(q, k, v, MASK)
    assert [(s.what, s.kernel) for s in steps if s.what == OP] == [(OP, "dequantized")]


def test_the_kernel_is_for_tensor_cores_that_multiply_8_bits() -> None:
    facts = Facts("cuda", torch.bfloat16, capability=(8, 9), triton=(3, 6, 0))
    facts = facts._replace(block_size=(64, 64), head_dim=128)
    assert requirements.triton_attention_fp8(facts) is None
    for capability in ((8, 0), (8, 6)):
        reason = requirements.triton_attention_fp8(facts._replace(capability=capability))
        assert reason is not None
        assert "8.9" in reason
    for wrong in (
        {"block_size": (24, 24)},
        {"head_dim": 300},
        {"device": "cpu"},
        {"triton": None},
        {"dtype": torch.float64},
    ):
        assert requirements.triton_attention_fp8(facts._replace(**wrong)) is not None, wrong


def test_the_hopper_kernel_is_for_what_its_tiles_hold() -> None:
    facts = Facts("cuda", torch.bfloat16, capability=(9, 0), triton=(3, 6, 0), tma=True)
    facts = facts._replace(block_size=(64, 64), head_dim=128)
    assert requirements.hopper_attention_fp8(facts) is None
    for wrong, words in (
        ({"capability": (10, 0)}, "compute capability 9.0"),
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"block_size": (64, 32)}, "at least 64"),
        ({"head_dim": 160}, "up to 128"),
        ({"lengths": True}, "sequences"),
        ({"tma": False}, "quantize_fp8"),
    ):
        reason = requirements.hopper_attention_fp8(facts._replace(**wrong))
        assert reason is not None, wrong
        assert words in reason


def test_what_the_quantiser_makes_can_be_read_by_the_copy_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_attention_fp8, "capability_of", lambda device: (9, 0))

    def tma(q: Any, k: Any, v: Any) -> bool:
        return block_attention_fp8.facts(
            q.data, k.data, v.data, q.dtype, (64, 64), lengths=False
        ).tma

    for tokens, head_dim in ((100, 64), (77, 72), (64, 128)):
        q, k, v = sl.quantize_fp8(*[normal(1, 2, tokens, head_dim) for _ in range(3)])
        assert tma(q, k, v)
        assert not tma(q, k, v._replace(data=v.data.contiguous()))
        assert not tma(q._replace(data=q.data.mT.contiguous().mT), k, v)
    odd = sl.quantize_fp8(*[normal(1, 2, 64, 60) for _ in range(3)])
    assert not tma(*odd)  # rows of the result do not begin at multiples of 16 bytes


def test_what_is_broadcast_over_samples_is_explained_as_it_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_attention_fp8, "capability_of", lambda device: (9, 0))
    q, k, v = sl.quantize_fp8(normal(3, 2, 64, 32), normal(1, 2, 64, 32), normal(1, 2, 64, 32))
    (use, *_) = block_attention_fp8.uses_of_fp8(q, k, v, MASK, None)
    assert not use.facts.tma  # the copy engine takes no stride of 0
    (use, *_) = block_attention_fp8.uses_of_fp8(*three(), MASK, None)
    assert use.facts.tma


@on_gpu
def test_the_kernel_is_chosen(device: str) -> None:
    *operands, mask = square(device)
    quantised = sl.quantize_fp8(*operands)
    with sl.trace() as steps:
        out = sl.attention(*quantised, mask)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert [s.kernel for s in steps if s.what == OP] == ["hopper" if hopper else "triton"]
    with sl.kernel_choice(**{OP: "dequantized"}):
        other = sl.attention(*quantised, mask)
    # at most the probabilities are rounded to e4m3
    assert 0 < relative_error(out, other.double()) < 1 / 16


# --- compiled, captured, without waiting ----------------------------------------------------------


def whole_way(q: Tensor, k: Tensor, v: Tensor, mask: sl.BSRTensor) -> Tensor:
    """Quantises and attends."""
    return sl.attention(*sl.quantize_fp8(q, k, v), mask)


@on_devices
# Inductor's advice on float32 products, and what it imports
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled(device: str) -> None:
    torch._dynamo.reset()
    *operands, mask = fewer_queries_and_kv_heads(device)
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(whole_way, fullgraph=True, backend=backend)
    found, expected = compiled(*operands, mask), whole_way(*operands, mask)
    # inductor may add up the mean of the keys in another order
    assert relative_error(found, expected.double()) < rounding_of_e4m3()


@on_gpu
def test_a_warm_call_does_not_wait_for_the_gpu(device: str) -> None:
    *operands, mask = fewer_queries_and_kv_heads(device)
    expected = whole_way(*operands, mask)
    with host_syncs_raise():
        found = whole_way(*operands, mask)
    assert torch.equal(found, expected)


@on_gpu
def test_captured_in_a_cuda_graph(device: str) -> None:
    *operands, mask = square(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            whole_way(*operands, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_way(*operands, mask)
    for t in operands:
        t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, whole_way(*operands, mask))


# --- called again ---------------------------------------------------------------------------------


def usual(q: Any, k: Any, v: Any, mask: sl.BSRTensor) -> Tensor:
    """The result by the usual way, with the same kernel."""
    with sl.kernel_choice(**{OP: "hopper"}):
        found: Tensor = sl.attention(q, k, v, mask)
    return found


@on_hopper
@pytest.mark.parametrize("make", [square, fewer_queries_and_kv_heads])
def test_recalled_calls_give_the_same_bits(make: Callable[[str], Given], device: str) -> None:
    mask = make(device)[-1]
    for _ in range(4):
        quantised = sl.quantize_fp8(*make(device)[:3])
        assert torch.equal(sl.attention(*quantised, mask), usual(*quantised, mask))
    assert len(mask._recalled or {}) == 1
    q, k, v = quantised
    # another dtype of the result, another scale, other strides, no mean: other calls
    for other in (
        (q._replace(dtype=torch.float16), k, v),
        (q._replace(data=q.data.clone().transpose(1, 2).contiguous().transpose(1, 2)), k, v),
        (q, k._replace(shift=None), v),
    ):
        for _ in range(2):
            assert torch.equal(sl.attention(*other, mask), usual(*other, mask))
    assert len(mask._recalled or {}) == 4
    with pytest.raises(NotImplementedError, match="asks for a gradient"):
        sl.attention(q._replace(scale=q.scale.clone().requires_grad_()), k, v, mask)
    with pytest.raises(ValueError, match=r"expected k.shift to be"):
        sl.attention(q, k._replace(shift=k.shift[..., :8]), v, mask)  # type: ignore[index]
    with pytest.raises(TypeError, match=r"k.scale is torch.float32, got torch.float64"):
        sl.attention(q, k._replace(scale=k.scale.double()), v, mask)


@on_gpu
@pytest.mark.parametrize(("block", "head_dim", "heads"), [(64, 128, 2), (16, 64, 4), (128, 40, 1)])
def test_recalled_calls_of_triton_give_the_same_bits(
    block: int, head_dim: int, heads: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = [row for row in KERNELS.rows[OP] if row.name == "triton"]
    monkeypatch.setitem(KERNELS.rows, OP, triton)
    monkeypatch.setattr(KERNELS, "chosen", {})
    mask = sl.sliding_window(512, block_size=block, window=150, device=device)
    kept = []
    for _ in range(3):
        q = normal(2, 4, 300, head_dim, device=device)
        kv = [normal(2, heads, 512, head_dim, device=device) for _ in range(2)]
        quantised = sl.quantize_fp8(q, *kv)
        with sl.kernel_choice(**{OP: "triton"}):
            expected = sl.attention(*quantised, mask)
        assert torch.equal(sl.attention(*quantised, mask), expected)
        kept.append(quantised)  # so that every round has other addresses
    (settled,) = (mask._recalled or {}).values()
    assert isinstance(settled.forward, triton_forward.PreparedForward)


@on_hopper
def test_a_recalled_call_does_not_wait_and_is_captured(device: str) -> None:
    *operands, mask = square(device)
    quantised = sl.quantize_fp8(*operands)
    expected = sl.attention(*quantised, mask)
    with host_syncs_raise():
        assert sl.attention(*quantised, mask).shape == expected.shape
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sl.attention(*quantised, mask)
    captured.fill_(math.nan)
    for _ in range(2):
        graph.replay()
    assert torch.equal(captured, expected)
