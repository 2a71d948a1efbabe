"""block_attention, by definition: dense scores, the mask's counts, a softmax, a product."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, dense_counts
from sparse_layouts.kernels.block_attention.sequences import Sequences, places

_ROUNDS, _MUL = 10, (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(seed: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011, and `tl.philox`): four uint32 words, held in int64, a
    counter.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        b, a = c0 * _MUL[0], c2 * _MUL[1]
        c0, c1, c2, c3 = (
            (a >> 32) & _LOW ^ c1 ^ k0,
            a & _LOW,
            (b >> 32) & _LOW ^ c3 ^ k1,
            b & _LOW,
        )
        k0, k1 = (k0 + _KEY[0]) & _LOW, (k1 + _KEY[1]) & _LOW
    return c0, c1, c2, c3


def dropout_keep(
    seed: Tensor, p: float, batch: Tensor, head: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """Which probabilities dropout keeps: word `column % 4` of philox(seed; column // 4, row, head,
    batch) >= p * 2^32.

    `seed` is an int64 tensor of one element; the indices are int64, broadcast against each other;
    `row` counts in the mask's rows. Every kernel draws the same: an implementation may share one
    philox call among four neighbouring columns.
    """
    shape = torch.broadcast_shapes(batch.shape, head.shape, row.shape, column.shape)
    counters = (
        (column // 4).expand(shape),
        row.expand(shape),
        head.expand(shape),
        batch.expand(shape),
    )
    words = torch.stack(philox(seed, counters), -1)
    word = words.gather(-1, (column % 4).expand(shape)[..., None])[..., 0]
    return word >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """p as a uint32: a word below it is dropped."""
    return min(int(p * 2**32), 2**32 - 1)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of softmax(scale * q @ k.mT + bias, over the entries that the pattern stores) @
    v.

    Shapes: q (B, H, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv), any strides, Hkv divides H; out
    (B, H, Nq, Dv) in q's dtype, lse (B, H, Nq), natural logarithm, fp32 (fp64 for fp64).
    `pattern.shape` is (M, Nk) with M >= Nq: query r stands in the mask's row M - Nq + r. `head_map`
    (B or 1, H) int32 says which of the pattern's P list sets each head uses; `pattern.lead` and
    `pattern.head_map` are not read. A block that counts c times has its probabilities multiplied by
    c. A row without entries gives 0 and lse -inf.

    bias: values (B or 1, Sb, bm, bn) added to the scaled scores. The block at position t of the row
    lists of pattern p has its bias at slot `bias_base[b, h] + t - crow_indices[p, 0]`; `bias_base`
    (B or 1, H) int64. Dropout as in `dropout_keep`; lse does not see it; kept probabilities are
    divided by 1 - p.

    `sequences`: B of them lie in the operands as :class:`Sequences` says, whatever Nq, Nk and
    `pattern.shape` are. Query r of a sequence stands in the pattern's row k_len - q_len + r, its
    key c in column c: a pattern is laid over each sequence from its first key, and fewer queries
    than keys are the last ones. What lies beyond the pattern is not attended to. `head_map`,
    `bias`, `bias_base` and dropout's `batch` count in sequences, so that packed sequences and the
    samples of a padded batch give the same. Rows of q that belong to no sequence, and queries
    before the pattern's first row, give 0 and lse -inf; nothing is read there, NaN or not.
    """
    (m, _), nq = pattern.shape, q.shape[2]
    counts = dense_counts(pattern._replace(head_map=None, lead=(pattern.num_patterns,)))
    counts = counts[head_map.long()]  # (B or 1, H, M, N)
    if bias is not None:
        assert bias_base is not None
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        bias = _dense_bias(bias.to(accumulate), bias_base, pattern, head_map)
    if sequences is None:
        first = m - nq
        last = None if bias is None else bias[:, :, first:]
        return _attend(q, k, v, counts[:, :, first:], last, scale, dropout_p, seed, first)

    where = places(sequences, nq, k.shape[2], pattern)
    rows, columns = (torch.arange(size, device=q.device) for size in pattern.shape)
    has_query = (rows >= where.first_row[:, None]) & (rows < where.end_row[:, None])  # (B, M)
    has_key = columns < where.num_keys[:, None]  # (B, N)
    q_index = _flat_rows(q, where.q_origin[:, None] + rows, has_query, sequences)
    k_index = _flat_rows(k, where.k_start[:, None] + columns, has_key, sequences)
    counts = counts * (has_query[:, None, :, None] & has_key[:, None, None, :])
    laid = (_laid_over(q, q_index), _laid_over(k, k_index), _laid_over(v, k_index))
    out, lse = _attend(*laid, counts, bias, scale, dropout_p, seed, 0)
    result = _taken_back(out, q_index, q.new_zeros(*q.shape[:3], v.shape[3]))
    fill = lse.new_full((*q.shape[:3], 1), -torch.inf)
    return result, _taken_back(lse[..., None], q_index, fill)[..., 0]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of queries in the mask's rows from `first_row` on; counts and bias (B or 1, H,
    Nq, Nk).
    """
    (batch, heads, nq, _), n = q.shape, k.shape[2]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = heads // k.shape[1]
    k, v = (t.to(accumulate).repeat_interleave(group, 1) for t in (k, v))
    scores = scale * (q.to(accumulate) @ k.mT)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(counts == 0, -torch.inf) + counts.clamp(min=1).to(accumulate).log()
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(counts.sum(-1) == 0, 0.0)
    probabilities = (scores - finite[..., None]).exp()
    if dropout_p:
        assert seed is not None
        index = [
            torch.arange(size, device=q.device).view([-1 if i == d else 1 for i in range(4)])
            for d, size in enumerate((batch, heads, nq, n))
        ]
        keep = dropout_keep(seed, dropout_p, index[0], index[1], index[2] + first_row, index[3])
        probabilities = probabilities * keep / (1 - dropout_p)
    return (probabilities @ v).to(q.dtype), lse


def _flat_rows(x: Tensor, row: Tensor, there: Tensor, sequences: Sequences) -> Tensor:
    """(B, R) indices into the rows of all samples of x, one after another; past the last one where
    nothing is `there`.
    """
    samples, _, rows, _ = x.shape
    if not sequences.packed:
        row = row + torch.arange(samples, device=x.device)[:, None] * rows
    return row.where(there, samples * rows)


def _laid_over(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, R, D) of the rows `index` (B, R) of x, 0 where there is none."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[index].transpose(1, 2)


def _taken_back(x: Tensor, index: Tensor, elsewhere: Tensor) -> Tensor:
    """The rows x (B, H, R, D) in the places that `_laid_over` took them from, others' as given."""
    samples, heads, rows, width = elsewhere.shape
    flat = elsewhere.transpose(1, 2).flatten(0, 1)
    flat = torch.cat([flat, flat.new_zeros(1, heads, width)])
    flat = flat.index_copy(0, index.flatten(), x.transpose(1, 2).flatten(0, 1))
    return flat[:-1].view(samples, rows, heads, width).transpose(1, 2)


def _dense_bias(bias: Tensor, base: Tensor, p: BlockPattern, head_map: Tensor) -> Tensor:
    """(B or 1, H, M, N) of bias values, 0 where nothing is stored; differentiable."""
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    rows = torch.arange(mb, device=bias.device)
    if bias.shape[0] == 0:
        return bias.new_zeros(1, head_map.shape[1], m, n)
    batches = []
    for b in range(max(bias.shape[0], head_map.shape[0])):
        values = bias[b % max(bias.shape[0], 1)]
        heads = []
        for which, start in zip(
            head_map[b % head_map.shape[0]], base[b % base.shape[0]], strict=True
        ):
            crow = p.crow_indices[which].long()
            entry_row = rows.repeat_interleave(crow.diff())
            where = entry_row * nb + p.col_indices[crow[0] : crow[-1]]
            own = values[start : start + where.numel()]
            dense = own.new_zeros(mb * nb, bm, bn).index_copy(0, where, own)
            heads.append(dense.view(mb, nb, bm, bn).transpose(1, 2).reshape(mb * bm, nb * bn))
        batches.append(torch.stack(heads)[:, :m, :n])
    return torch.stack(batches)


def block_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: BlockPattern,
    head_map: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    dbias_base: Tensor | None = None,
    dbias_blocks: int = 0,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(dq, dk, dv, dbias)` from the gradients to out and lse (None: zero); the other arguments as
    in the forward.

    `dbias_base` (B or 1, H) int64, asked for where bias needs a gradient, gives every head slots of
    its own, as `bias_base` does in the forward but never shared: dbias is (B, dbias_blocks, bm, bn)
    in bias's dtype, 0 at what is not stored; whoever shares a bias among heads or samples adds up.
    With `dbias_base` of B > 1 rows the slots of all samples are distinct and dbias has batch 1.
    With `sequences` B counts these; what belongs to none has gradient 0, whatever dout is there.
    """
    samples = q.shape[0] if sequences is None else sequences.num_sequences
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        own_bias = None
        if bias is not None and dbias_base is not None:
            own_bias = _own_bias(
                bias, bias_base, pattern, head_map, dbias_base, dbias_blocks, samples
            )
            own_bias = own_bias.detach().requires_grad_()
        o, s = block_attention(
            leaves[0],
            leaves[1],
            leaves[2],
            pattern,
            head_map,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            bias=bias if own_bias is None else own_bias,
            bias_base=bias_base if own_bias is None else dbias_base,
            sequences=sequences,
        )
        inputs = leaves if own_bias is None else [*leaves, own_bias]
        outputs, gradients = [o], [dout]
        if dlse is not None:
            outputs.append(s.masked_fill(s.isneginf(), 0.0))
            gradients.append(dlse)
        grads = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
    filled = [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]
    return filled[0], filled[1], filled[2], filled[3] if own_bias is not None else None


def _own_bias(
    bias: Tensor,
    base: Tensor | None,
    p: BlockPattern,
    head_map: Tensor,
    dbase: Tensor,
    blocks: int,
    batch: int,
) -> Tensor:
    """The bias laid out so that no head and no sample shares a slot: (B or 1, blocks, bm, bn)."""
    assert base is not None
    samples = 1 if dbase.shape[0] > 1 else batch
    own = bias.new_zeros(samples, blocks, *p.block_size)
    for b in range(batch):
        for h in range(head_map.shape[1]):
            crow = p.crow_indices[head_map[b % head_map.shape[0], h]]
            count = int(crow[-1] - crow[0])
            start, to = int(base[b % base.shape[0], h]), int(dbase[b % dbase.shape[0], h])
            own[b % samples, to : to + count] = bias[
                b % max(bias.shape[0], 1), start : start + count
            ]
    return own
