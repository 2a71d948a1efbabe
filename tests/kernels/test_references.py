"""The references, which define the ops, against plain dense torch in float64, and philox against
Triton's.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, dense_counts, unpack_tiles
from sparse_layouts.kernels.block_attention import reference as attention
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_matmul.reference import block_matmul, densify
from sparse_layouts.kernels.block_softmax.reference import block_softmax, block_softmax_backward
from sparse_layouts.kernels.sddmm.reference import sddmm
from tests.kernels.accuracy import (
    Arithmetic,
    as_results,
    dense_block_attention,
    dense_block_attention_backward,
)
from tests.kernels.cases import (
    OPS,
    SEQUENCE_CASES,
    Call,
    Case,
    Stored,
    make_pattern,
    random_source,
)
from tests.rounding import assert_close

OF_SEQUENCES = {case.name for case in SEQUENCE_CASES}


def cases(op: str) -> pytest.MarkDecorator:
    """Over the cases of an op that have no NaN in them."""
    without = {"unread_nan", "hopper_gaps", *OF_SEQUENCES}
    chosen = [pytest.param(c, id=c.name) for c in OPS[op] if c.name not in without]
    return pytest.mark.parametrize("case", chosen)


def sequence_cases(op: str) -> pytest.MarkDecorator:
    """Over the cases of several sequences, with NaN wherever none of them lies."""
    chosen = [pytest.param(c, id=c.name) for c in OPS[op] if c.name in OF_SEQUENCES]
    return pytest.mark.parametrize("case", chosen)


def in_double(case: Case) -> Call:
    """The case's call in float64."""
    return case.build(torch.float64, "cpu")


def counts_entry_by_entry(p: BlockPattern) -> Tensor:
    """(P, M, N) from the row lists alone, one block at a time: how often each entry counts."""
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    out = torch.zeros(p.num_patterns, mb * bm, nb * bn, dtype=torch.float64)
    bits = None if p.tiles is None else unpack_tiles(p)
    for which, row, t, column in list_entries(p):
        slot = t if p.row_slots is None else int(p.row_slots[t])
        block = torch.ones(bm, bn, dtype=torch.float64)
        if p.block_tiles is not None and int(p.block_tiles[slot]):
            assert bits is not None
            block = bits[int(p.block_tiles[slot]) - 1].double()
        if p.block_counts is not None:
            block = block * int(p.block_counts[slot])
        out[which, row * bm : (row + 1) * bm, column * bn : (column + 1) * bn] = block
    return out[:, :m, :n]


def list_entries(p: BlockPattern) -> list[tuple[int, int, int, int]]:
    """(pattern, block row, position, block column) of everything in the row lists."""
    return [
        (which, row, t, int(p.col_indices[t]))
        for which in range(p.num_patterns)
        for row in range(p.grid[0])
        for t in range(int(p.crow_indices[which, row]), int(p.crow_indices[which, row + 1]))
    ]


def matrices_block_by_block(values: Tensor, p: BlockPattern) -> Tensor:
    """(B, P, M, N) of values (B, S, bm, bn), one block at a time."""
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    out = values.new_zeros(values.shape[0], p.num_patterns, mb * bm, nb * bn)
    for which, row, t, column in list_entries(p):
        slot = t if p.row_slots is None else int(p.row_slots[t])
        rows, columns = slice(row * bm, (row + 1) * bm), slice(column * bn, (column + 1) * bn)
        out[:, which, rows, columns] = values[:, slot]
    return out[..., :m, :n]


def additive_mask(counts: Tensor) -> Tensor:
    """What a dense softmax adds to its scores: -inf where nothing is stored, log of the count
    elsewhere.
    """
    return counts.double().log()


@cases("sddmm")
def test_dense_counts_and_matrices_follow_the_lists(case: Case) -> None:
    call = in_double(case)
    p = call.pattern
    counts = dense_counts(p._replace(lead=(p.num_patterns,)))
    assert torch.equal(counts.double(), counts_entry_by_entry(p))
    values = torch.randn(2, p.num_blocks, *p.block_size, dtype=torch.float64)
    assert torch.equal(densify(values, p), matrices_block_by_block(values, p))


@cases("block_matmul")
def test_block_matmul_is_a_matmul(case: Case) -> None:
    values, pattern, x = in_double(case).args
    expected = torch.matmul(matrices_block_by_block(values, pattern), x)
    for transposed in (False, True):
        out = block_matmul(values, pattern, x, transposed_output=transposed)
        assert_close(out, expected)
        assert (out.mT if transposed else out).is_contiguous()


@cases("sddmm")
def test_sddmm_is_a_product_at_the_stored_entries(case: Case) -> None:
    a, b, pattern = in_double(case).args
    values = sddmm(a, b, pattern)
    expected = torch.matmul(a, b) * (counts_entry_by_entry(pattern) > 0)
    assert_close(matrices_block_by_block(values, pattern), expected)
    # over the edge, which no matrix shows, there are zeros
    total = values.abs().sum()
    assert_close(total, matrices_block_by_block(values, pattern).abs().sum())


@cases("block_softmax")
@pytest.mark.parametrize("log", [False, True])
def test_block_softmax_is_a_softmax_with_minus_infinity(case: Case, log: bool) -> None:
    values, pattern = in_double(case).args
    counts = counts_entry_by_entry(pattern)
    scores = matrices_block_by_block(values, pattern) + additive_mask(counts)
    dense = torch.log_softmax(scores, -1) if log else torch.softmax(scores, -1)
    out = matrices_block_by_block(block_softmax(values, pattern, log=log), pattern)
    assert_close(out, dense.where(counts > 0, 0.0))


@cases("block_softmax")
@pytest.mark.parametrize("log", [False, True])
def test_block_softmax_backward_is_its_gradient(case: Case, log: bool) -> None:
    values, pattern = in_double(case).args
    values = values.clone().requires_grad_()
    out = block_softmax(values, pattern, log=log)
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, values, grad)
    assert_close(block_softmax_backward(grad, out.detach(), pattern, log=log), expected)


def sdpa(call: Call) -> tuple[Tensor, Tensor]:
    """torch's own attention with a dense additive mask, and the logsumexp of its scores; NaN where
    nothing is stored.
    """
    q, k, v, pattern, head_map = call.args
    options = call.kwargs
    (m, _), nq, group = pattern.shape, q.shape[2], q.shape[1] // k.shape[1]
    mask = additive_mask(counts_entry_by_entry(pattern))[head_map.long(), m - nq :]
    if "bias" in options:
        mask = mask + bias_block_by_block(call)[:, :, m - nq :]
    mask = mask.expand(q.shape[0], -1, -1, -1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options["scale"])
    return out, (options["scale"] * q @ k.mT + mask).logsumexp(-1)


def bias_block_by_block(call: Call) -> Tensor:
    """(B, H, M, N) of the call's bias."""
    q, _, _, p, head_map = call.args
    bias, base = call.kwargs["bias"], call.kwargs["bias_base"]
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    out = torch.zeros(*q.shape[:2], mb * bm, nb * bn, dtype=torch.float64)
    entries = list_entries(p)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            of_head = int(head_map[b % head_map.shape[0], h])
            first = int(base[b % base.shape[0], h]) - int(p.crow_indices[of_head, 0])
            for which, row, t, column in entries:
                if which == of_head:
                    block = out[b, h, row * bm : (row + 1) * bm, column * bn : (column + 1) * bn]
                    block.copy_(bias[b % bias.shape[0], first + t])
    return out[..., :m, :n]


@cases("block_attention")
def test_block_attention_is_sdpa_with_a_dense_mask(case: Case) -> None:
    call = in_double(case)
    if call.kwargs.get("dropout_p"):
        call = Call(call.args, {**call.kwargs, "dropout_p": 0.0})
    if call.args[0].shape[0] == 0:
        pytest.skip("a batch of none has no entries to compare")
    out, lse = attention.block_attention(*call.args, **call.kwargs)
    expected, expected_lse = sdpa(call)
    empty = expected_lse.isneginf()
    assert_close(lse, expected_lse)
    assert_close(out, expected.masked_fill(empty[..., None], 0.0))


@cases("block_attention_backward")
def test_block_attention_backward_is_the_formula(case: Case) -> None:
    call = in_double(case)
    got = attention.block_attention_backward(*call.args, **call.kwargs)
    arithmetic = Arithmetic(torch.float64, torch.float64)
    formula = dense_block_attention_backward(arithmetic, *call.args, **call.kwargs)
    for a, b in zip(as_results(got), formula, strict=True):
        assert (a is None) == (b is None)  # no bias, no gradient of one
        if a is not None and b is not None:
            assert_close(a, b)


@pytest.mark.parametrize("name", ["causal", "all_stored", "shared_bias"])
def test_block_attention_backward_is_the_gradient_of_sdpa(name: str) -> None:
    case = next(c for c in OPS["block_attention_backward"] if c.name == name)
    call = in_double(case)
    dout, dlse, *leaves, _, _, pattern, head_map = call.args
    leaves = [t.clone().requires_grad_() for t in leaves]
    if (bias := call.kwargs.get("bias")) is not None:
        assert bias.shape[1] == pattern.num_blocks
    options = {k: v for k, v in call.kwargs.items() if not k.startswith("dbias")}
    out, lse = sdpa(Call((*leaves, pattern, head_map), options))
    some = ~lse.detach().isneginf()  # rows with no entry have no gradient
    expected = torch.autograd.grad([out[some], lse[some]], leaves, [dout[some], dlse[some]])
    got = attention.block_attention_backward(*call.args, **call.kwargs)
    for a, b in zip(got[:3], expected, strict=True):
        assert_close(a, b)


@sequence_cases("block_attention")
def test_block_attention_of_sequences_is_that_of_each(case: Case) -> None:
    call = in_double(case)
    out, lse = attention.block_attention(*call.args, **call.kwargs)
    arithmetic = Arithmetic(torch.float64, torch.float64)
    expected, expected_lse = dense_block_attention(arithmetic, *call.args, **call.kwargs)
    assert expected is not None
    assert expected_lse is not None
    assert bool(expected.isfinite().all())
    assert_close(out, expected)
    assert_close(lse, expected_lse)


@sequence_cases("block_attention_backward")
def test_block_attention_backward_of_sequences_is_that_of_each(case: Case) -> None:
    call = in_double(case)
    got = attention.block_attention_backward(*call.args, **call.kwargs)
    arithmetic = Arithmetic(torch.float64, torch.float64)
    formula = dense_block_attention_backward(arithmetic, *call.args, **call.kwargs)
    for a, b in zip(got, formula, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert bool(b.isfinite().all())
            assert_close(a, b)


def test_sequences_that_fill_a_batch_are_the_plain_batch() -> None:
    """`sequences` adds nothing where every sample is a sequence as long as a square pattern."""
    case = next(c for c in OPS["block_attention"] if c.name == "causal")
    q, k, v, pattern, head_map = in_double(case).args
    lens = torch.full((q.shape[0],), pattern.shape[0], dtype=torch.int32)
    expected = attention.block_attention(q, k, v, pattern, head_map, scale=0.3)
    for starts in (None, torch.zeros_like(lens)):
        found = attention.block_attention(
            q, k, v, pattern, head_map, scale=0.3, sequences=Sequences(starts, lens, starts, lens)
        )
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_references_differentiate() -> None:
    pattern = make_pattern(Stored((5, 7), (3, 4), 2, tiles=True, counts=True), random_source("g"))
    q = torch.randn(1, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, pattern.num_blocks, 3, 4, dtype=torch.float64, requires_grad=True)
    head_map = torch.tensor([[0, 1]], dtype=torch.int32)
    base = pattern.crow_indices[:, 0].long()[None]

    def attend(*operands: Tensor) -> Any:
        out, lse = attention.block_attention(
            *operands[:3], pattern, head_map, scale=0.6, bias=operands[3], bias_base=base
        )
        return out, lse[~lse.isneginf()]

    assert torch.autograd.gradcheck(attend, (q, k, v, bias), fast_mode=True)
    values = torch.randn(1, pattern.num_blocks, 3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 2, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, y: block_matmul(w, pattern, y), (values, x), fast_mode=True
    )
    assert torch.autograd.gradcheck(lambda y: sddmm(y[:, :, :5], y.mT, pattern), x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda w: block_softmax(w, pattern), values, fast_mode=True)


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, 2**32 + 5, 2**62 + 12345])
def test_philox_is_tritons(seed: int) -> None:
    from tests.kernels.small_kernels import philox_words

    count = 64
    seeds = torch.tensor([seed], dtype=torch.int64)
    drawn = torch.empty(count, 4, dtype=torch.int32)
    philox_words[(1,)](drawn, seeds, N=count)
    i = torch.arange(count)
    words = torch.stack(attention.philox(seeds, (i, 2 * i, 3 * i, i + 2**31)), -1)
    assert torch.equal(words, drawn.long() & 0xFFFFFFFF)


def test_philox_known_answers() -> None:
    """The known-answer tests of Random123 (github.com/DEShawResearch/random123, kat_vectors:
    philox4x32 10).
    """
    ones = 0xFFFFFFFF
    answers = {
        (0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (ones, -1): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }
    for (counter, seed), expected in answers.items():
        counters = (torch.tensor([counter]),) * 4
        words = attention.philox(torch.tensor([seed]), counters)
        assert tuple(int(word) for word in words) == expected


def kept(p: float, seed: int, size: tuple[int, int, int, int] = (2, 3, 120, 140)) -> Tensor:
    """What dropout keeps of a (B, H, Nq, N)."""
    index = torch.meshgrid(*(torch.arange(s) for s in size), indexing="ij")
    return attention.dropout_keep(torch.tensor([seed]), p, *index)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_as_many_as_it_says(p: float) -> None:
    keep = kept(p, 2**40 + 3).double()
    deviation = math.sqrt(p * (1 - p))
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3)):
        share = keep.mean(dims)
        drawn = keep.numel() / share.numel()
        assert (share - (1 - p)).abs().max() <= 5 * deviation / math.sqrt(drawn)
    by_row, by_column = keep.mean(-1).flatten(), keep.mean(-2).flatten()
    if p:
        for share, drawn in ((by_row, keep.shape[-1]), (by_column, keep.shape[-2])):
            assert float(share.std() * math.sqrt(drawn) / deviation) == pytest.approx(1, abs=0.1)


def test_dropout_draws_anew_for_every_index_and_seed() -> None:
    keep = kept(0.5, 11).double() - 0.5
    for other in (
        kept(0.5, 12),
        keep.roll(1, 0) + 0.5,
        keep.roll(1, 1) + 0.5,
        keep.roll(1, 2) + 0.5,
    ):
        agreement = float((keep * (other.double() - 0.5)).mean()) * 4
        assert abs(agreement) <= 5 / math.sqrt(keep.numel())
    assert torch.equal(kept(0.5, 11), kept(0.5, 11))
    assert torch.equal(
        kept(0.5, 11)[:, :, 40:, 4:], kept(0.5, 11, (2, 3, 120, 144))[:, :, 40:, 4:140]
    )


def test_dropout_drops_probabilities_and_divides() -> None:
    case = next(c for c in OPS["block_attention"] if c.name == "dropout")
    call = in_double(case)
    q, k, v, pattern, head_map = call.args
    p, n = call.kwargs["dropout_p"], pattern.shape[1]
    keys_as_values = torch.eye(n, dtype=torch.float64).expand(*v.shape[:2], n, n)
    dropped, whole = (
        attention.block_attention(q, k, keys_as_values, pattern, head_map, **options)
        for options in (call.kwargs, {**call.kwargs, "dropout_p": 0.0})
    )
    keep = kept(p, int(call.kwargs["seed"]), (q.shape[0], q.shape[1], *pattern.shape))
    assert_close(dropped[0], whole[0] * keep / (1 - p))
    assert torch.equal(dropped[1], whole[1])
