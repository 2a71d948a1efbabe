"""Bad input: the exception, and a message that says expected, got and what to do."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl

# torch's own sparse tensors say so once a process
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")

Case = tuple[Callable[[], object], type[Exception], str]

N = 32
MASK = sl.causal(N, block_size=8)
HEADS = sl.local_stride(N, block_size=8, local_blocks=1, vert_stride=2, num_heads=3)
W = sl.bsr(torch.eye(N), block_size=8)
OTHER = sl.bsr(torch.eye(N).flip(0), block_size=8)
Q = torch.ones(1, 2, N, 4)
A, B = torch.ones(N, 4), torch.ones(4, N)


def local(**options: object) -> sl.LocalStrideTensor:
    given = {"block_size": 8, "local_blocks": 1, "vert_stride": 2, **options}
    return sl.local_stride(given.pop("seq_len", N), **given)


FACTORIES: dict[str, Case] = {
    "bsr of a list": (
        lambda: sl.bsr([[1.0]], 1),
        TypeError,
        "expected a dense or torch.sparse .*got list",
    ),
    "bsr of a bool": (lambda: sl.bsr(A > 0, 4), TypeError, r"got a bool tensor; sl\.mask_from"),
    "bsr of a vector": (
        lambda: sl.bsr(torch.ones(8), 4),
        ValueError,
        r"expected \(\*lead, M, N\), got",
    ),
    "bsr that does not divide": (
        lambda: sl.bsr(torch.ones(30, 30), 8),
        ValueError,
        r"\(8, 8\) does not divide the matrix \(30, 30\); pad it to \(32, 32\)",
    ),
    "bsr by default 32": (
        lambda: sl.bsr(torch.ones(16, 16)),
        ValueError,
        r"\(32, 32\) does not divide",
    ),
    "bsr block 0": (lambda: sl.bsr(A, 0), ValueError, "block_size must be positive, got 0"),
    "bsr block -4": (lambda: sl.bsr(A, (4, -4)), ValueError, r"must be positive, got \(4, -4\)"),
    "bsr block float": (lambda: sl.bsr(A, 4.0), TypeError, "int or a pair of ints, got 4.0"),
    "bsr block text": (lambda: sl.bsr(A, "44"), TypeError, "int or a pair of ints, got '44'"),
    "bsr block triple": (lambda: sl.bsr(A, (4, 4, 4)), TypeError, r"got \(4, 4, 4\)"),
    "bsr block bool": (lambda: sl.bsr(A, True), TypeError, "int or a pair of ints, got True"),
    "bsr keep number": (
        lambda: sl.bsr(A, 4, keep=0.5),
        TypeError,
        r"sparsifier such as sl\.Magnitude.*got 0\.5",
    ),
    "bsr keep of sparse": (
        lambda: sl.bsr(torch.eye(8).to_sparse(), 4, keep=sl.Magnitude(0.5)),
        ValueError,
        "a sparse tensor has chosen already",
    ),
    "bsr of a sparse batch": (
        lambda: sl.bsr(torch.ones(2, 8, 8).to_sparse(), 4),
        ValueError,
        "convert each sample for itself",
    ),
    "magnitude 2": (lambda: sl.Magnitude(2.0), ValueError, "between 0 and 1, got 2.0"),
    "magnitude nan": (lambda: sl.Magnitude(float("nan")), ValueError, "between 0 and 1, got nan"),
    "bsr_mask of floats": (
        lambda: sl.bsr_mask(torch.ones(2, 2), 8),
        TypeError,
        r"bool or integer counts, got torch\.float32; write blocks != 0",
    ),
    "bsr_mask of nan": (
        lambda: sl.bsr_mask(torch.tensor([[float("nan")]]), 8),
        TypeError,
        "bool or integer counts, got torch.float32",
    ),
    "bsr_mask of a layout": (
        lambda: sl.bsr_mask(MASK, 8),
        TypeError,
        "dense tensor .*got BSRTensor",
    ),
    "bsr_mask of a list": (lambda: sl.bsr_mask([[1]], 8), TypeError, "dense tensor .*got list"),
    "bsr_mask of a vector": (
        lambda: sl.bsr_mask(torch.ones(2, dtype=torch.bool), 8),
        ValueError,
        r"\(\*lead, Mb, Nb\), got shape \(2,\)",
    ),
    "bsr_mask of negative counts": (
        lambda: sl.bsr_mask(torch.tensor([[1, -2]]), 8),
        ValueError,
        "counts must not be negative, got -2",
    ),
    "bsr_mask of another shape": (
        lambda: sl.bsr_mask(torch.ones(2, 2, dtype=torch.bool), 8, shape=(17, 16)),
        ValueError,
        r"cover a shape up to \(16, 16\), not \(17, 16\); that takes 3 x 2 blocks",
    ),
    "mask_from of floats": (
        lambda: sl.mask_from(torch.ones(8, 8), 4),
        TypeError,
        r"expected a bool tensor, got torch\.float32; write x != 0",
    ),
    "mask_from of a list": (
        lambda: sl.mask_from([[True]], 4),
        TypeError,
        "expected a bool tensor, got list",
    ),
    "mask_from of a vector": (
        lambda: sl.mask_from(torch.ones(8, dtype=torch.bool), 4),
        ValueError,
        r"expected \(\*lead, M, N\), got shape \(8,\)",
    ),
    "mask_from block": (lambda: sl.mask_from(A > 0, 0), ValueError, "block_size must be positive"),
    "causal float": (lambda: sl.causal(8.0, block_size=4), TypeError, "seq_len is an int, got 8.0"),
    "causal bool": (
        lambda: sl.causal(True, block_size=4),
        TypeError,
        "seq_len is an int, got True",
    ),
    "causal -1": (
        lambda: sl.causal(-1, block_size=4),
        ValueError,
        "seq_len must be at least 0, got -1",
    ),
    "causal pair": (
        lambda: sl.causal(8, block_size=(4, 8)),
        ValueError,
        r"square blocks, got \(4, 8\)",
    ),
    "window 0": (
        lambda: sl.sliding_window(8, block_size=4, window=0),
        ValueError,
        "window must be at least 1, got 0",
    ),
    "window float": (
        lambda: sl.sliding_window(8, block_size=4, window=2.5),
        TypeError,
        "window is an int, got 2.5",
    ),
    "sinks -1": (
        lambda: sl.sink_window(8, block_size=4, window=1, sinks=-1),
        ValueError,
        "sinks must be at least 0, got -1",
    ),
    "document of floats": (
        lambda: sl.document([0.0, 8.0], block_size=4),
        TypeError,
        "cu_seqlens are integers, got torch.float32",
    ),
    "document from 1": (
        lambda: sl.document([1, 8], block_size=4),
        ValueError,
        r"begin at 0, not decrease.*got \[\[1, 8\]\]",
    ),
    "document decreasing": (
        lambda: sl.document([0, 5, 3], block_size=4),
        ValueError,
        "not decrease",
    ),
    "document of two ends": (
        lambda: sl.document([[0, 5], [0, 6]], block_size=4),
        ValueError,
        "end at one N for all samples",
    ),
    "document of a scalar": (
        lambda: sl.document(torch.tensor(8), block_size=4),
        ValueError,
        r"\(n \+ 1,\) or \(B, n \+ 1\), got shape \(\)",
    ),
    "local_stride stride 0": (
        lambda: local(vert_stride=0),
        ValueError,
        "vert_stride must be at least 1, got 0",
    ),
    "local_stride local -1": (
        lambda: local(local_blocks=-1),
        ValueError,
        "local_blocks must be at least 0",
    ),
    "local_stride heads 0": (
        lambda: local(num_heads=0),
        ValueError,
        "num_heads must be at least 1, got 0",
    ),
    "local_stride heads text": (
        lambda: local(num_heads="2"),
        TypeError,
        "num_heads is an int, got '2'",
    ),
    "local_stride kv heads": (
        lambda: local(num_heads=4, num_kv_heads=3),
        ValueError,
        "num_kv_heads 3 must divide num_heads 4",
    ),
    "local_stride dense heads": (
        lambda: local(num_heads=4, num_kv_heads=2, num_dense_heads=3),
        ValueError,
        "num_dense_heads 3 is more than the 2 KV heads",
    ),
    "local_stride offset": (
        lambda: local(head_offset=-1),
        ValueError,
        "head_offset must be at least 0",
    ),
    "local_stride length": (lambda: local(seq_len=-8), ValueError, "seq_len must be at least 0"),
    "local_stride block": (lambda: local(block_size=0), ValueError, "block_size must be positive"),
}

OPERATIONS: dict[str, Case] = {
    "without_counts of a dense tensor": (
        lambda: sl.without_counts(torch.eye(4)),  # type: ignore[arg-type]
        TypeError,
        "expected a block layout, got Tensor",
    ),
    "matmul of another length": (
        lambda: W @ torch.ones(N + 1, 2),
        ValueError,
        r"\(32, 32\) \(layout\) and \(33, 2\) do not fit: 32 and 33 must be equal",
    ),
    "matmul from the right": (
        lambda: torch.ones(2, N + 1) @ W,
        ValueError,
        "32 and 33 must be equal",
    ),
    "matmul of a vector": (lambda: W @ torch.ones(N - 1), ValueError, "32 and 31 must be equal"),
    "matmul of a scalar": (lambda: W @ torch.tensor(1.0), ValueError, "has no dimension"),
    "matmul of two dtypes": (
        lambda: W @ torch.ones(N, 2, dtype=torch.float64),
        TypeError,
        r"expected one dtype, got torch\.float32 and torch\.float64; convert one with \.to",
    ),
    "matmul of two devices": (
        lambda: W @ torch.ones(N, 2, device="meta"),
        ValueError,
        "layout is on cpu, the dense operand on meta",
    ),
    "matmul of a mask": (
        lambda: MASK @ torch.ones(N, 2),
        TypeError,
        r"mask layout has no values to multiply; convert it first: mask\.to\(torch\.float32\)",
    ),
    "matmul of other heads": (
        lambda: torch.ones(3, N, N).sparse_mask(HEADS) @ torch.ones(2, N, 2),
        (ValueError, RuntimeError),
        "do not fit|broadcast",
    ),
    "linear of another length": (
        lambda: F.linear(torch.ones(2, N + 1), W),
        ValueError,
        "32 and 33 must be equal",
    ),
    "linear of 3-D": (
        lambda: F.linear(A.mT, torch.ones(3, N, N).sparse_mask(HEADS)),
        ValueError,
        r"expected a 2-D weight, got shape \(3, 32, 32\)",
    ),
    "linear bias": (
        lambda: F.linear(B, W, torch.ones(N - 1)),
        ValueError,
        r"expected a bias of shape \(32,\), got \(31,\)",
    ),
    "softmax of a mask": (
        lambda: torch.softmax(MASK, -1),
        TypeError,
        r"no values; scores come from sl\.sddmm",
    ),
    "softmax over heads": (
        lambda: torch.softmax(torch.ones(3, N, N).sparse_mask(HEADS), 0),
        ValueError,
        r"rows or columns .*\(dim -1 or -2\), got 0 of 3",
    ),
    "softmax of integers": (
        lambda: torch.softmax(W.int(), -1),
        TypeError,
        "expected a floating dtype, got torch.int32",
    ),
    "softmax without dim": (lambda: F.softmax(W), TypeError, "dim is needed, -1"),
    "sddmm without a mask": (
        lambda: sl.sddmm(A, B, torch.ones(N, N, dtype=torch.bool)),
        TypeError,
        r"expected a layout as the mask, got Tensor; sl\.mask_from",
    ),
    "sddmm of integers": (
        lambda: sl.sddmm(A.int(), B.int(), MASK),
        TypeError,
        "a is floating, got torch.int32",
    ),
    "sddmm of two dtypes": (
        lambda: sl.sddmm(A, B.double(), MASK),
        TypeError,
        "expected one dtype, got",
    ),
    "sddmm of layouts": (
        lambda: sl.sddmm(W, B, MASK),
        TypeError,
        "a is a dense tensor, got BSRTensor",
    ),
    "sddmm of a vector": (
        lambda: sl.sddmm(torch.ones(N), B, MASK),
        ValueError,
        "a is at least 2-D",
    ),
    "sddmm of another length": (
        lambda: sl.sddmm(torch.ones(N + 1, 4), B, MASK),
        ValueError,
        r"expected a \(\.\.\., 32, K\) and b \(\.\.\., K, 32\).*got \(33, 4\)",
    ),
    "sddmm of two devices": (
        lambda: sl.sddmm(A.to("meta"), B, MASK),
        ValueError,
        "a is on meta, the mask on cpu",
    ),
    "sddmm of other heads": (
        lambda: sl.sddmm(torch.ones(2, N, 4), B, HEADS),
        (ValueError, RuntimeError),
        "do not fit|broadcast",
    ),
    "sparse_mask of another shape": (
        lambda: torch.ones(N, N + 8).sparse_mask(MASK),
        ValueError,
        r"expected a tensor of shape \(\*batch, 32, 32\), got \(32, 40\)",
    ),
    "and of two lengths": (
        lambda: MASK & sl.causal(N + 8, block_size=8),
        ValueError,
        r"one shape and block size, got \(32, 32\) by \(8, 8\) and \(40, 40\)",
    ),
    "and of two blocks": (
        lambda: MASK & sl.causal(N, block_size=16),
        ValueError,
        "one shape and block size",
    ),
    "and of values": (
        lambda: MASK & W,
        TypeError,
        r"expected masks, got torch\.float32.*w\.pattern",
    ),
    "or of values": (lambda: W | W, TypeError, r"expected masks.*w\.pattern"),
    "not of values": (
        lambda: ~W,
        TypeError,
        r"expected a mask, got torch\.float32 values; ~w\.pattern",
    ),
    "add_ dense": (lambda: W.clone().add_(torch.ones(N, N)), TypeError, "sparse_mask"),
    "+= dense": (lambda: operator.iadd(W.clone(), torch.ones(N, N)), TypeError, "sparse_mask"),
    "add_ of another pattern": (
        lambda: W.clone().add_(OTHER),
        TypeError,
        "store different entries.*sparse_mask",
    ),
    "copy_ dense": (
        lambda: W.clone().copy_(torch.ones(N, N)),
        ValueError,
        "does not store.*sparse_mask",
    ),
    "values of a mask": (
        lambda: MASK.values(),
        TypeError,
        r"mask layout has none; mask\.to\(dtype\)",
    ),
    "bool of values": (lambda: W.bool(), TypeError, r"cannot become bool; w\.pattern"),
    "policy": (
        lambda: sl.fallback("maybe"),
        ValueError,
        "expected one of warn, error, allow; got 'maybe'",
    ),
    "kernel": (lambda: sl.kernel_choice(block_matmul="x"), ValueError, "no kernel 'x'; it has"),
}


def sdpa(
    q: Tensor = Q, k: Tensor = Q, v: Tensor = Q, mask: object = MASK, **options: object
) -> object:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def attention(
    q: Tensor = Q, k: Tensor = Q, v: Tensor = Q, mask: object = MASK, **options: object
) -> object:
    return sl.attention(q, k, v, mask, **options)


SHORT = torch.ones(1, 2, N - 8, 4)
THREE = torch.ones(1, 3, N, 4)
ATTENTION: dict[str, Case] = {
    "is_causal": (
        lambda: sdpa(is_causal=True),
        ValueError,
        r"attn_mask and is_causal=True exclude each other; make the mask causal: mask & sl\.causal",
    ),
    "fewer queries": (
        lambda: sdpa(q=SHORT),
        ValueError,
        r"mask has 32 rows, there are 24 queries; sl\.attention takes the last rows",
    ),
    "more queries": (
        lambda: attention(q=torch.ones(1, 2, N + 8, 4)),
        ValueError,
        "mask has 32 rows, fewer than the 40 queries",
    ),
    "another length": (
        lambda: sdpa(k=SHORT, v=SHORT),
        ValueError,
        "mask is for 32 keys, there are 24; build it for this length, or slice it",
    ),
    "integer q": (lambda: sdpa(q=Q.int()), TypeError, "q must be floating, got torch.int32"),
    "two dtypes": (
        lambda: sdpa(q=Q.double()),
        TypeError,
        r"expected one dtype, got .*convert with \.to",
    ),
    "other heads": (
        lambda: sdpa(mask=HEADS),
        ValueError,
        r"mask has 3 heads; expected 2 \(query heads\), 2 \(KV heads\) or 1",
    ),
    "heads that do not divide": (
        lambda: sdpa(q=THREE, enable_gqa=True),
        ValueError,
        "2 KV heads do not divide 3 query heads",
    ),
    "without enable_gqa": (
        lambda: sdpa(q=torch.ones(1, 4, N, 4)),
        ValueError,
        "4 query heads and 2 KV heads need enable_gqa=True",
    ),
    "head sizes": (lambda: sdpa(q=torch.ones(1, 2, N, 5)), ValueError, "q has head size 5, k 4"),
    "k and v": (lambda: sdpa(v=SHORT), ValueError, "differ in batch, heads or length"),
    "batch": (
        lambda: sdpa(
            q=Q.expand(2, -1, -1, -1), k=Q.expand(3, -1, -1, -1), v=Q.expand(3, -1, -1, -1)
        ),
        ValueError,
        "batch sizes 2 and 3 differ",
    ),
    "mask of another batch": (
        lambda: sdpa(mask=sl.document([[0, N]] * 3, block_size=8)),
        ValueError,
        "mask is for a batch of 3, there are 1 samples",
    ),
    "mask of five dimensions": (
        lambda: sdpa(mask=sl.bsr_mask(torch.ones(1, 1, 1, 4, 4, dtype=torch.bool), 8)),
        ValueError,
        "at most a batch and a head dimension",
    ),
    "dimensions": (
        lambda: sdpa(q=Q[0]),
        ValueError,
        "q, k and v have 3, 4 and 4 dimensions; expected the same",
    ),
    "a vector": (
        lambda: attention(q=torch.ones(4)),
        ValueError,
        r"q is \(B, H, N, D\).*got shape \(4,\)",
    ),
    "device": (
        lambda: attention(q=Q.to("meta")),
        ValueError,
        "q is on meta, the mask on cpu; move it with mask.to",
    ),
    "dropout 1.5": (
        lambda: attention(dropout_p=1.5),
        ValueError,
        "at least 0 and below 1, got 1.5",
    ),
    "scale nan": (lambda: attention(scale=float("nan")), ValueError, "scale is a number, got nan"),
    "dense mask": (
        lambda: attention(mask=torch.ones(N, N, dtype=torch.bool)),
        TypeError,
        r"expected a block mask such as sl\.causal.*got Tensor; sl\.mask_from",
    ),
    "float mask": (
        lambda: attention(mask=W),
        TypeError,
        r"expected a bool mask layout, got torch\.float32 values; add scores as bias=",
    ),
    "q a layout": (lambda: attention(q=W), TypeError, "q is a dense tensor, got BSRTensor"),
    "dense bias": (
        lambda: attention(bias=torch.ones(N, N)),
        TypeError,
        r"bias is a block layout of scores such as sl\.sddmm.*got Tensor",
    ),
    "bias of other blocks": (
        lambda: attention(bias=W),
        ValueError,
        r"bias is not on the mask's blocks; make it with sl\.sddmm",
    ),
    "bias of other heads": (
        lambda: attention(bias=torch.ones(3, N, N).sparse_mask(MASK)),
        ValueError,
        r"bias \(3, 32, 32\) does not broadcast",
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(name: str) -> None:
    call, kind, message = FACTORIES[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    call, kind, message = OPERATIONS[name]
    with sl.fallback("allow"), pytest.raises(kind, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    call, kind, message = ATTENTION[name]
    with sl.fallback("allow"), pytest.raises(kind, match=f"(?s){message}"):
        call()


def test_a_sparse_tensor_with_broken_indices() -> None:
    broken = torch.sparse_bsr_tensor(
        torch.tensor([0, 2]),
        torch.tensor([1, 0]),
        torch.ones(2, 4, 4),
        (4, 8),
        check_invariants=False,
    )
    with pytest.raises(ValueError, match="col_indices: expected ascending columns"):
        sl.bsr(broken)


def test_wrong_construction() -> None:
    with pytest.raises(TypeError, match=r"expected 11 tensors \(values, crow_indices.*got 1"):
        sl.BSRTensor(torch.ones(1, 4, 4), shape=(4, 4), block_size=(4, 4), lead_dims=0)
    inner = W.inner_tensors()
    with pytest.raises(TypeError, match=r"expected the static fields .*block_size"):
        sl.BSRTensor(*inner, shape=(N, N))


def test_nothing_is_densified_on_the_way_to_an_error() -> None:
    with sl.trace() as steps:
        for call, kind, _ in (*OPERATIONS.values(), *ATTENTION.values()):
            with pytest.raises(kind):
                call()
    assert [s for s in steps if s.kernel == "dense fallback"] == []


def test_empty_inputs_work() -> None:
    empty = sl.bsr(torch.zeros(N, N), block_size=8)
    nothing = sl.bsr_mask(torch.zeros(4, 4, dtype=torch.bool), 8)
    with sl.fallback("error"):
        assert not (empty @ torch.ones(N, 2)).any()
        assert sl.sddmm(A, B, nothing).nnz == 0
        out, lse = sl.attention(Q, Q, Q, nothing, return_lse=True)
        assert not out.any()
        assert bool(lse.isneginf().all())
        assert (W @ torch.ones(0, N, 2)).shape == (0, N, 2)
        assert attention(q=Q[:0], k=Q[:0], v=Q[:0]).shape == (0, 2, N, 4)
        assert F.linear(torch.ones(0, N), W).shape == (0, N)
