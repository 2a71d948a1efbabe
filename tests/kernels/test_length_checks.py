"""Lengths that do not fit: errors say what was expected, what came and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl

N = 32
MASK = sl.causal(N, block_size=8)
PACKED = torch.ones(40, 2, 4)
BATCH = torch.ones(3, 2, N, 4)
ENDS = torch.tensor([0, 32, 40])
LENS = torch.tensor([5, 0, 32])


def packed(
    q: Tensor = PACKED, k: Tensor = PACKED, mask: Any = MASK, both: Any = None, **cu: Any
) -> Any:
    """A call with cu_seqlens; `both` are those of q and of k."""
    given = {"cu_seqlens_q": both, "cu_seqlens_k": both} if both is not None else {}
    if not given and not cu:
        given = {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS}
    return sl.attention(q, k, k, mask, **given, **cu)


def padded(q: Tensor = BATCH, k: Tensor = BATCH, mask: Any = MASK, **lens: Any) -> Any:
    return sl.attention(q, k, k, mask, **(lens or {"q_lens": LENS}))


Case = tuple[Callable[[], Any], type[Exception], str]
KINDS: dict[str, Case] = {
    "both kinds": (
        lambda: packed(both=ENDS, kv_lens=LENS),
        ValueError,
        r"expected cu_seqlens_q and cu_seqlens_k \(packed sequences\) or q_lens, kv_lens, "
        r"kv_starts \(a padded batch\), got cu_seqlens_q, cu_seqlens_k, kv_lens; .*one kind",
    ),
    "cu_seqlens_q alone": (
        lambda: packed(cu_seqlens_q=ENDS),
        ValueError,
        "got cu_seqlens_q alone; for self-attention pass cu_seqlens_k=cu_seqlens_q",
    ),
    "cu_seqlens_k alone": (
        lambda: packed(cu_seqlens_k=ENDS),
        ValueError,
        "got cu_seqlens_k alone; for self-attention pass cu_seqlens_q=cu_seqlens_k",
    ),
    "a list": (
        lambda: padded(q_lens=[1, 2, 3]),
        TypeError,
        r"q_lens is an int32 or int64 tensor, got list; torch\.tensor\(q_lens, dtype=torch\.int32",
    ),
    "a layout": (
        lambda: padded(kv_lens=MASK),
        TypeError,
        "kv_lens is an int32 or int64 tensor, got BSRTensor",
    ),
    "floats": (
        lambda: packed(both=ENDS.float()),
        TypeError,
        r"cu_seqlens_q is an int32 or int64 tensor, got torch\.float32; convert with "
        r"cu_seqlens_q\.to\(torch\.int32\)",
    ),
    "int16": (lambda: padded(kv_starts=LENS.short()), TypeError, r"got torch\.int16"),
    "bool": (lambda: padded(kv_starts=LENS > 0), TypeError, r"got torch\.bool"),
    "a matrix of ends": (
        lambda: packed(both=ENDS[None]),
        ValueError,
        r"cu_seqlens_q is \(B \+ 1,\) for B sequences, got shape \(1, 3\); of their lengths \(B,\) "
        r"it is torch\.nn\.functional\.pad\(lengths\.cumsum\(0\), \(1, 0\)\)",
    ),
    "no ends": (lambda: packed(both=ENDS[:0]), ValueError, r"got shape \(0,\)"),
    "other sequences": (
        lambda: packed(cu_seqlens_q=ENDS, cu_seqlens_k=ENDS[:2]),
        ValueError,
        r"of the same sequences, got shapes \(3,\) and \(2,\); a sequence without queries or keys",
    ),
    "a number too many": (
        lambda: padded(kv_lens=torch.tensor([1, 2, 3, 4])),
        ValueError,
        r"expected kv_lens of shape \(3,\), a number for each sample, got \(4,\); one number for "
        r"all is torch\.full\(\(3,\), number\)",
    ),
    "one number": (lambda: padded(q_lens=torch.tensor(5)), ValueError, r"got \(\)"),
    "another device": (
        lambda: padded(q_lens=LENS.to("meta")),
        ValueError,
        r"q_lens is on meta, q on cpu; move it once, outside of the step, with q_lens\.to\('cpu'\)",
    ),
    "a padded batch with ends": (
        lambda: packed(q=BATCH, k=BATCH),
        ValueError,
        r"with cu_seqlens q is \(T, H, D\).*got shape \(3, 2, 32, 4\); a padded .* takes q_lens",
    ),
    "packed k that is not": (
        lambda: packed(k=BATCH),
        ValueError,
        r"with cu_seqlens k is \(T, H, D\)",
    ),
    "packed with q_lens": (
        lambda: padded(q=PACKED, k=PACKED),
        ValueError,
        r"with q_lens q is \(B, H, N, D\), got shape \(40, 2, 4\); packed sequences \(T, H, D\) "
        r"take cu_seqlens_q",
    ),
    "heads": (
        lambda: packed(q=torch.ones(40, 3, 4)),
        ValueError,
        "2 KV heads do not divide 3 query heads",
    ),
    "head sizes": (lambda: packed(q=torch.ones(40, 2, 5)), ValueError, "q has head size 5, k 4"),
    "mask of other heads": (
        lambda: packed(
            mask=sl.local_stride(N, block_size=8, local_blocks=1, vert_stride=2, num_heads=3)
        ),
        ValueError,
        r"the mask has 3 heads; expected 2",
    ),
    "mask of other sequences": (
        lambda: packed(mask=sl.document([[0, N]] * 3, block_size=8)),
        ValueError,
        "the mask is for a batch of 3, there are 2 sequences",
    ),
    "bias of other sequences": (
        lambda: packed(both=ENDS, bias=torch.ones(3, 1, N, N).sparse_mask(MASK)),
        ValueError,
        r"bias \(3, 1, 32, 32\) does not broadcast to \(2, 2\) sequences and heads",
    ),
}

VALUES: dict[str, Case] = {
    "begins late": (
        lambda: packed(both=torch.tensor([1, 32, 40])),
        ValueError,
        r"cu_seqlens_q begins at 0, got 1; torch\.nn\.functional\.pad",
    ),
    "decreases": (
        lambda: packed(cu_seqlens_q=ENDS, cu_seqlens_k=torch.tensor([0, 32, 8])),
        ValueError,
        "cu_seqlens_k must not decrease, got 8 after 32; it holds where sequences end, not how",
    ),
    "ends late": (
        lambda: packed(cu_seqlens_q=torch.tensor([0, 9, 41]), cu_seqlens_k=ENDS),
        ValueError,
        "cu_seqlens_q ends at 40, the rows of q, or before, got 41; leave out",
    ),
    "too large for int32": (
        lambda: packed(both=torch.tensor([0, 9, 2**32 + 9])),
        ValueError,
        "cu_seqlens_q ends at 40, the rows of q, or before, got 2147483647",
    ),
    "longer than the mask": (
        lambda: packed(both=torch.tensor([0, 5, 40])),
        ValueError,
        r"a mask that is at least as long as the longest sequence, got \(32, 32\) for one of 35 "
        "keys; build it for 35 or more",
    ),
    "a mask of few rows": (
        lambda: packed(mask=sl.bsr_mask(torch.ones(2, 4, dtype=torch.bool), 8)),
        ValueError,
        r"got \(16, 32\) for one of 32 keys",
    ),
    "negative q_lens": (
        lambda: padded(q_lens=torch.tensor([1, -1, 2])),
        ValueError,
        "expected q_lens from 0 to 32, the rows of q, got -1 for sample 1; clamp it",
    ),
    "q_lens too large": (lambda: padded(q_lens=LENS + 1), ValueError, "got 33 for sample 2"),
    "kv_starts too large": (
        lambda: padded(kv_starts=torch.tensor([0, 33, 0])),
        ValueError,
        "expected kv_starts from 0 to 32, the rows of k, got 33 for sample 1",
    ),
    "kv_lens after kv_starts": (
        lambda: padded(kv_starts=LENS, kv_lens=torch.tensor([27, 32, 1])),
        ValueError,
        "expected kv_lens from 0 to 0, the rows of k from there on, got 1 for sample 2",
    ),
    "padded longer than the mask": (
        lambda: padded(k=torch.ones(3, 2, 50, 4), kv_starts=torch.tensor([18, 20, 17])),
        ValueError,
        "for one of 33 keys; build it for 33 or more",
    ),
}


@pytest.mark.parametrize("name", [*KINDS, *VALUES])
def test_errors(name: str) -> None:
    call, kind, message = {**KINDS, **VALUES}[name]
    with sl.trace() as steps, pytest.raises(kind, match=f"(?s)^attention: .*{message}"):
        call()
    assert not list(steps)


def test_explain_raises_the_same() -> None:
    arguments = (PACKED, PACKED, PACKED, MASK)
    for cu in (torch.tensor([0, 5, 40]), ENDS.float()):
        raised = []
        for call in (sl.attention, lambda *a, **o: sl.explain(sl.attention, *a, **o)):
            with pytest.raises((ValueError, TypeError)) as error:
                call(*arguments, cu_seqlens_q=cu, cu_seqlens_k=cu)
            raised.append(str(error.value))
        assert raised[0] == raised[1]


def test_lengths_that_fit_exactly() -> None:
    whole = torch.tensor([N, 0, N])
    assert padded(q_lens=whole, kv_starts=N - whole, kv_lens=whole).shape == BATCH.shape
    assert packed().shape == PACKED.shape


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_checks_values_too() -> None:
    compiled = torch.compile(
        lambda q, cu: sl.attention(q, q, q, MASK, cu_seqlens_q=cu, cu_seqlens_k=cu),
        fullgraph=True,
        backend="aot_eager",
    )
    assert compiled(PACKED, ENDS).shape == PACKED.shape
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease"):
        compiled(PACKED, torch.tensor([0, 30, 20]))
