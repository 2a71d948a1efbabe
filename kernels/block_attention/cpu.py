"""block_attention's forward on the CPU: stacked query tiles against gathered keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_attention.cpu_sequences import (
    BlocksInPlace,
    lies_in_rows,
    sequence_schedule,
)
from sparse_layouts.kernels.block_attention.reference import dropout_keep, dropout_threshold, philox
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.cpu_common import (
    LOG2_E,
    Scratch,
    add_masks,
    pad_rows,
    product_dtype,
    score_dtype,
)
from sparse_layouts.kernels.cpu_schedule import Schedule, Step, attention_schedule


def query_range(plan: Schedule, pattern: BlockPattern, num_queries: int) -> tuple[int, int]:
    """Where the queries begin among the rows of the plan's tiles, and how many rows those are."""
    start = plan.first_tile * plan.group * pattern.block_size[0] + plan.crop
    return pattern.shape[0] - num_queries - start, plan.num_tiles * plan.rows


class TilePlaces(NamedTuple):
    """Where T tiles of a step stand, all int64: `samples`, `heads` and `rows`, the pattern's row in
    which a tile begins, (T,), and the pattern's block columns `blocks` (T, L).
    """

    samples: Tensor
    heads: Tensor
    rows: Tensor
    blocks: Tensor


def tile_places(plan: Schedule, step: Step, pattern: BlockPattern, sample: int) -> TilePlaces:
    """The places of a step's tiles; `sample` is that of a plan without sequences."""
    heads = step.tiles.div(plan.num_tiles, rounding_mode="floor")
    tile = step.tiles - heads * plan.num_tiles
    columns, own = step.columns.view(-1, step.length), plan.sequences
    if own is not None:
        blocks = columns % own.key_blocks - own.key_starts[tile][:, None]
        return TilePlaces(own.samples[tile], heads, own.rows[tile], blocks)
    rows = (plan.first_tile + tile) * plan.group * pattern.block_size[0] + plan.crop
    return TilePlaces(torch.full_like(tile, sample), heads, rows, columns % pattern.grid[1])


class BiasBlocks(NamedTuple):
    """Blocks of a bias or of its gradient: `values` (B * S, bm, bn), of which `samples` B have S
    each, and where those of a head begin, `base` (B or 1, H).
    """

    values: Tensor
    base: Tensor
    samples: int

    def slots(self, step: Step, where: TilePlaces) -> Tensor:
        """The slots (T, group, L) of a step's blocks; meaningless if dead."""
        assert step.positions is not None
        base = self.base[where.samples % self.base.shape[0], where.heads]
        first = where.samples % self.samples * (self.values.shape[0] // self.samples)
        return (base + first)[:, None, None] + step.positions


def bias_blocks(bias: Tensor | None, base: Tensor | None) -> BiasBlocks | None:
    """Of bias (B or 1, S, bm, bn); None without one."""
    if bias is None or base is None:
        return None
    return BiasBlocks(bias.flatten(0, 1), base, bias.shape[0])


def add_bias(
    scores: Tensor, plan: Schedule, step: Step, bias: BiasBlocks, where: TilePlaces
) -> None:
    """Adds the bias in base 2 to scores (T, R, C); dead blocks get some other block's."""
    _, bm, bn = bias.values.shape
    slots = bias.slots(step, where).clamp_(min=0)
    blocks = bias.values.index_select(0, slots.flatten())
    blocks = blocks.view(*slots.shape, bm, bn).transpose(2, 3)  # (T, group, bm, L, bn)
    by_block = scores.view(-1, plan.group, bm, step.length, bn)
    by_block.add_(blocks.to(scores.dtype), alpha=LOG2_E)


def kept(
    plan: Schedule, where: TilePlaces, pattern: BlockPattern, seed: Tensor, p: float
) -> Tensor:
    """bool (T, R, C): what dropout keeps of a step's probabilities."""
    bn = pattern.block_size[1]
    row = where.rows[:, None, None] + torch.arange(plan.rows)[:, None]
    block = where.blocks[:, None, :, None]
    sample, heads = where.samples[:, None, None], where.heads[:, None, None]
    if bn % 4:
        column = (block * bn + torch.arange(bn)).flatten(2)
        return dropout_keep(seed, p, sample, heads, row, column)
    quad = (block * (bn // 4) + torch.arange(bn // 4)).flatten(
        2
    )  # one philox call draws for four columns
    shape = torch.broadcast_shapes(row.shape, quad.shape)
    counters = (quad.expand(shape), row.expand(shape), heads.expand(shape), sample.expand(shape))
    return (torch.stack(philox(seed, counters), -1) >= dropout_threshold(p)).flatten(2)


class Options(NamedTuple):
    """What all steps of a call share."""

    pattern: BlockPattern
    scale: float
    dropout_p: float
    seed: Tensor | None
    bias: BiasBlocks | None


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
    """`(out, lse)` as the reference's `block_attention` defines them.

    Takes memory for one step of tiles, and for copies of operands that are not contiguous or fp32
    or lie in sequences.
    bf16: scores in fp32, so that large ones keep their digits, and the second product in bf16.
    """
    (batch, heads, nq, _), (kv_heads, nk, dv) = q.shape, v.shape[1:]
    high, low = score_dtype(q.dtype), product_dtype(q.dtype)
    out = torch.zeros(batch, heads, nq, dv, dtype=q.dtype)
    lse = torch.full((batch, heads, nq), -torch.inf, dtype=high)
    if out.numel() == 0 or pattern.num_blocks == 0:
        return out, lse
    options = Options(pattern, scale, dropout_p, seed, bias_blocks(bias, bias_base))
    scratch = Scratch()
    if sequences is not None:
        made = sequence_schedule(
            pattern, head_map, kv_heads, sequences, nq, nk, high, bias is not None
        )
        plan, spans = made.schedule, made.queries
        if plan.sequences is None or not plan.steps:
            return out, lse
        out_b = torch.zeros(heads, spans.total, dv, dtype=q.dtype)
        lse_b = torch.full((heads, spans.total), -torch.inf, dtype=high)
        keys: BlocksInPlace | LaidOutBlocks
        values: BlocksInPlace | LaidOutBlocks
        if made.reads_few(kv_heads) and lies_in_rows(k) and lies_in_rows(v):
            keys = BlocksInPlace(k, high, made.blocks, plan.sequences.key_blocks)
            values = BlocksInPlace(v, low, made.blocks, plan.sequences.key_blocks)
        else:
            keys = LaidOutBlocks(made.keys.laid_out(k, high))
            values = LaidOutBlocks(made.keys.laid_out(v, low))
        _attend(spans.laid_out(q, high), keys, values, out_b, lse_b, plan, 0, options, scratch)
        spans.put_back(out_b, out)
        spans.put_back(lse_b[..., None], lse[..., None])
        return out, lse
    padded_keys = pattern.grid[1] * pattern.block_size[1]
    for b in range(batch):
        own_map = head_map[b % head_map.shape[0]]
        plan = attention_schedule(pattern, own_map, kv_heads, nq, high, bias is not None)
        before, rows = query_range(plan, pattern, nq)
        queries = pad_rows(q[b], before, rows, high)
        keys = LaidOutBlocks(pad_rows(k[b], 0, padded_keys, high))
        values = LaidOutBlocks(pad_rows(v[b], 0, padded_keys, low))
        exact = rows == nq
        out_b = out[b] if exact else torch.zeros(heads, rows, dv, dtype=q.dtype)
        lse_b = lse[b] if exact else torch.full((heads, rows), -torch.inf, dtype=high)
        _attend(queries, keys, values, out_b, lse_b, plan, b, options, scratch)
        if not exact:
            out[b] = out_b[:, before : before + nq]
            lse[b] = lse_b[:, before : before + nq]
    return out, lse


class LaidOutBlocks(NamedTuple):
    """Blocks of keys or values in memory of their own, contiguous (Hkv, whole blocks, D)."""

    laid_out: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """In which they enter products."""
        return self.laid_out.dtype

    def gather(self, scratch: Scratch, name: str, step: Step, bn: int) -> Tensor:
        """A step's blocks (T, L * bn, D)."""
        blocks = self.laid_out.view(-1, bn * self.laid_out.shape[2])
        tiles = step.tiles.shape[0]
        return scratch.gather(name, blocks, step.columns, tiles, step.length * bn, -1)


def _attend(
    queries: Tensor,
    keys: LaidOutBlocks | BlocksInPlace,
    values: LaidOutBlocks | BlocksInPlace,
    out: Tensor,
    lse: Tensor,
    plan: Schedule,
    sample: int,
    options: Options,
    scratch: Scratch,
) -> None:
    """Writes out (H, tiles * R, Dv) and lse (H, tiles * R) of a plan's tiles.

    queries (H, tiles * R, D), contiguous.
    """
    high, low, dv = queries.dtype, values.dtype, out.shape[2]
    pattern, bias, seed, dropout_p = options.pattern, options.bias, options.seed, options.dropout_p
    tiny, lowest = torch.finfo(high).tiny, torch.finfo(high).min
    by_tile, block_columns = queries.shape[0] * plan.num_tiles, pattern.block_size[1]
    query_tiles, out_tiles, lse_tiles = (x.view(by_tile, -1) for x in (queries, out, lse))
    for step in plan.steps:
        tiles, columns = step.tiles.shape[0], step.length * block_columns
        q_tile = scratch.gather("q", query_tiles, step.tiles, tiles, plan.rows, -1)
        k_tile = keys.gather(scratch, "k", step, block_columns)
        scores = scratch.take("scores", high, tiles, plan.rows, columns)
        torch.baddbmm(scores, q_tile, k_tile.mT, beta=0, alpha=options.scale * LOG2_E, out=scores)
        if bias is not None:
            add_bias(scores, plan, step, bias, tile_places(plan, step, pattern, sample))
        add_masks(scores, plan, step, scratch)
        # A row of -inf keeps a finite maximum: its probabilities are then 0, not NaN.
        top = scores.amax(-1, keepdim=True).clamp_(min=lowest)
        scores.sub_(top).exp2_()
        total = scores.sum(-1, keepdim=True)
        lse_step = (total.log2() + top).mul_(1 / LOG2_E)
        lse_tiles.index_copy_(0, step.tiles, lse_step.view(tiles, -1))
        inverse = total.clamp_(min=tiny).reciprocal_()
        if dropout_p:
            assert seed is not None
            where = tile_places(plan, step, pattern, sample)
            scores.mul_(kept(plan, where, pattern, seed, dropout_p))
            inverse.mul_(1 / (1 - dropout_p))
        if low != high:
            scores.mul_(inverse)
        probabilities = scratch.cast("probabilities", scores, low)
        v_tile = values.gather(scratch, "v", step, block_columns)
        o_tile = scratch.take("o", low, tiles, plan.rows, dv)
        torch.bmm(probabilities, v_tile, out=o_tile)
        if low == high:
            o_tile.mul_(inverse)
        o_tile = scratch.cast("out", o_tile, out.dtype)
        out_tiles.index_copy_(0, step.tiles, o_tile.view(tiles, -1))
