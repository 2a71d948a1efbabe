"""Where sequences lie in the operands of attention: packed one after another, or padded in a batch.

The kernels read this from the device; nothing here waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern

INT32_MAX = 2**31 - 1


class Sequences(NamedTuple):
    """The rows of q, and of k and v, that B sequences have.

    field | shape, all contiguous int32 | meaning
    ---|---|---
    `q_starts` | (B,) or None | first row in q; None: sequence b is sample b, from its row 0
    `q_lens` | (B,) | queries
    `k_starts` | (B,) or None | first row in k and v; None: 0
    `k_lens` | (B,) | keys

    With `q_starts` the operands are packed: their batch is 1, and every sequence is a part of it.
    Without, they are padded: sequence b lies in sample b.

    Query r of a sequence stands in row `k_len - q_len + r` of the pattern, key c in column c. A
    query whose row is negative or not in the pattern attends to nothing; a key whose column is not
    in the pattern is not attended to. Sequences do not overlap; rows that belong to none are not
    read, and are 0, or -inf as a logsumexp, in results. Lengths are not to be trusted: a start is
    clamped to the tensor's rows, then a length to what follows the start.
    """

    q_starts: Tensor | None
    q_lens: Tensor
    k_starts: Tensor | None
    k_lens: Tensor

    @property
    def packed(self) -> bool:
        """Whether all sequences lie in one sample."""
        return self.q_starts is not None

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.q_lens.shape[0]


def sequences_of(
    q_starts: Tensor | None, q_lens: Tensor | None, k_starts: Tensor | None, k_lens: Tensor | None
) -> Sequences | None:
    """The four as an operator gets them; None without lengths: the plain batch."""
    if q_lens is None:
        return None
    assert k_lens is not None
    return Sequences(q_starts, q_lens, k_starts, k_lens)


def packed_sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Sequences:
    """Sequences whose rows end where the next one's begin; cu_seqlens (B + 1,)."""
    q = _int32(cu_seqlens_q)
    q_lens = q.diff()
    if cu_seqlens_k is cu_seqlens_q:
        return Sequences(q[:-1], q_lens, q[:-1], q_lens[:])
    k = _int32(cu_seqlens_k)
    return Sequences(q[:-1], q_lens, k[:-1], k.diff())


def padded_sequences(
    q: Tensor,
    k: Tensor,
    batch: int,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    kv_starts: Tensor | None,
) -> Sequences:
    """The samples of q (B, H, Nq, D) and k (B, Hkv, Nk, D); what is None is as long as can be."""

    def full(size: int) -> Tensor:
        return torch.full((batch,), size, dtype=torch.int32, device=q.device)

    starts = None if kv_starts is None else _int32(kv_starts)
    if kv_lens is not None:
        lens = _int32(kv_lens)
    elif starts is not None:
        lens = k.shape[2] - starts
    else:
        lens = full(k.shape[2])
    return Sequences(None, full(q.shape[2]) if q_lens is None else _int32(q_lens), starts, lens)


def _int32(t: Tensor) -> Tensor:
    """What does not fit stays too large, or negative. A view, because torch.compile refuses one
    tensor as two arguments of an autograd.Function.
    """
    if t.dtype == torch.int64:
        t = t.clamp(-1, INT32_MAX).int()
    return t.contiguous()[:]


class Places(NamedTuple):
    """Where the sequences stand in the pattern, lengths clamped; (B,) int64 each.

    Pattern rows [first_row, end_row) have a query; that of row p is row `q_origin + p` of q's
    sample. Pattern columns [0, num_keys) have a key; that of column c is row `k_start + c` of k.
    """

    q_origin: Tensor
    first_row: Tensor
    end_row: Tensor
    k_start: Tensor
    num_keys: Tensor


def places(sequences: Sequences, q_rows: int, k_rows: int, pattern: BlockPattern) -> Places:
    """Of sequences in tensors of `q_rows` and `k_rows` rows a sample."""
    q_start, q_len = _clamped(sequences.q_starts, sequences.q_lens, q_rows)
    k_start, k_len = _clamped(sequences.k_starts, sequences.k_lens, k_rows)
    past = k_len - q_len
    first_row = past.clamp(min=0)
    end_row = torch.maximum(k_len.clamp(max=pattern.shape[0]), first_row)
    return Places(q_start - past, first_row, end_row, k_start, k_len.clamp(max=pattern.shape[1]))


def _clamped(starts: Tensor | None, lens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    lens = lens.long()
    start = torch.zeros_like(lens) if starts is None else starts.long().clamp(0, rows)
    return start, torch.minimum(lens.clamp(min=0), rows - start)
