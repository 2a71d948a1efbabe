"""What the columns pass of the Hopper backward relies on, on the CPU: which tiles it visits, with
which rows and masks, gives the gradients; the tables that programs find their items by.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, transpose_pattern
from sparse_layouts.dispatch.kernel_table import KERNELS
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.block_attention import reference
from sparse_layouts.kernels.block_attention.heads import shared_lists
from sparse_layouts.kernels.block_attention.sequences import Sequences, places
from sparse_layouts.kernels.block_attention.unit_schedule import (
    DEAD,
    RUN_BEGIN,
    RUN_END,
    START,
    TILES,
    UNIT,
    UNITS,
    UnitSchedule,
    unit_schedule,
)
from tests.kernels.accuracy import without_nan
from tests.kernels.cases import OPS, Call, Case, Stored, make_pattern, random_source
from tests.kernels.test_kernel_suite import facts_on_gpus

NUM_UNITS = 2
# tile by tile in Python they take longer than all others together
LONG = {"long_dropout", "long_lists_16", "long_lists_64", "long_lists_128", "packed_64"}
LONG |= {"packed_long"}


def taken() -> list[Case]:
    """The cases that reach the two passes on a GPU."""
    return [
        case
        for case in OPS["block_attention_backward"]
        if any(
            requirements.hopper_attention_two_passes(facts) is None
            for facts in facts_on_gpus(case, torch.bfloat16)
        )
    ]


def tile_of(
    p: BlockPattern, s: UnitSchedule, tile: int, u: int, unit: int
) -> tuple[Tensor, Tensor]:
    """Rows of the mask (64,), negative where there is none, and how often they are stored beside
    the unit's keys (64, 64), as the kernel finds it. `p` is the transposed pattern.
    """
    bn, bm = p.block_size
    piece, sub = min(bm, UNIT), max(1, UNIT // bn)
    slots, offs = UNIT // piece, torch.arange(UNIT)
    slot = tile * slots + offs // piece
    rows = s.columns[slot] * piece + offs % piece
    sub_row = u * sub + (offs // bn if bn < UNIT else 0 * offs)
    which = s.block_tiles[slot][:, sub_row].mT  # [keys, queries]
    stored = (which == 0).int()
    if p.tiles is not None:
        in_block = ((unit * UNIT + offs) % bn)[:, None]
        column = (rows % bm)[None, :]
        bits = p.tiles[(which - 1).clamp(min=0).long(), in_block, column // 32] >> (column % 32)
        stored = torch.where(which > 0, (bits & 1).int(), stored)
    if s.log_counts is not None:
        stored = stored * s.log_counts[slot][:, sub_row].mT.exp2().round().int()
    return rows.long(), stored


class Item:
    """Where the queries and keys of an item lie: of sample b, or of a sequence."""

    def __init__(self, b: int, q: Tensor, k: Tensor, m: int) -> None:
        self.sample, self.shift = b, q.shape[2] - m
        self.first_row, self.end_row = m - q.shape[2], m
        self.first_key, self.num_keys = 0, k.shape[2]

    def of(self, sequences: Sequences, b: int, q: Tensor, k: Tensor, p: BlockPattern) -> Item:
        """The same for sequence b."""
        found = places(sequences, q.shape[2], k.shape[2], p)
        self.sample = 0 if sequences.packed else b
        self.shift, self.first_row = int(found.q_origin[b]), int(found.first_row[b])
        self.end_row, self.num_keys = int(found.end_row[b]), int(found.num_keys[b])
        self.first_key = int(found.k_start[b])
        return self


def live_tiles(s: UnitSchedule, first: int, tiles: int, item: Item, piece: int) -> list[bool]:
    """Which tiles have rows."""
    rows = s.columns[first * (UNIT // piece) : (first + tiles) * (UNIT // piece)] * piece
    live = (rows >= 0) & (rows < item.end_row) & (rows + piece > item.first_row)
    found: list[bool] = live.view(tiles, -1).any(1).tolist()
    return found


def by_column(call: Call) -> tuple[Tensor, Tensor]:
    """dk and dv in the steps of the kernel, in fp64."""
    dout, dlse, q, k, v, out, lse, p, head_map = call.args
    options, sequences = call.kwargs, call.kwargs.get("sequences")
    p_drop, seed = options.get("dropout_p", 0.0), options.get("seed")
    group = q.shape[1] // k.shape[1]
    alike = sequences is None and shared_lists(p, head_map, group)
    transposed = transpose_pattern(p)
    s = unit_schedule(transposed, NUM_UNITS, UNIT, pair_by_length=alike)
    piece = min(p.block_size[0], UNIT)
    delta = (out * dout).sum(-1) - (0 if dlse is None else dlse)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    offs = torch.arange(UNIT)
    for b in range(q.shape[0] if sequences is None else sequences.num_sequences):
        item = Item(b, q, k, p.shape[0])
        groups = s.rows.shape[1]
        if sequences is not None:
            item = item.of(sequences, b, q, k, p)
            groups = math.ceil(item.num_keys / (NUM_UNITS * UNIT))
            groups = groups if item.end_row > item.first_row else 0
            assert groups <= s.rows.shape[1]
        for head, rank in ((h, g) for h in range(q.shape[1]) for g in range(groups)):
            row = s.rows[int(head_map[b % head_map.shape[0], head]), rank].tolist()
            tiles = list(range(row[START], row[START] + row[TILES]))
            live = [True] * len(tiles)
            if sequences is not None:
                live = live_tiles(s, row[START], row[TILES], item, piece)
                tiles = [t for t, there in zip(tiles, live, strict=True) if there]
            for u, unit in enumerate(row[UNITS : UNITS + NUM_UNITS]):
                begin, end = (sum(live[: row[x + u]]) for x in (RUN_BEGIN, RUN_END))
                assert all((int(s.flags[t]) >> 2 * u) & DEAD for t in tiles[:begin] + tiles[end:])
                if unit < 0:
                    continue
                keys = unit * UNIT + offs
                has_key = keys < item.num_keys
                at = (item.first_key + keys)[has_key]
                for t in tiles[begin:end]:
                    rows, stored = tile_of(transposed, s, t, u, unit)
                    exists = (rows >= item.first_row) & (rows < item.end_row)
                    rows, stored = rows[exists], stored[has_key][:, exists]
                    own = (item.sample, head, rows + item.shift)
                    kv = (item.sample, head // group, at)
                    x = options["scale"] * k[kv] @ q[own].mT - lse[own]
                    prob = torch.where(stored > 0, x.exp() * stored, 0.0)
                    dp = v[kv] @ dout[own].mT
                    kept = prob
                    if seed is not None and p_drop > 0:
                        keep = reference.dropout_keep(
                            seed,
                            p_drop,
                            torch.tensor(b),
                            torch.tensor(head),
                            rows[None, :],
                            keys[has_key][:, None],
                        )
                        factor = keep.double() * (1 / (1 - p_drop) if p_drop < 1 else 0)
                        kept, dp = prob * factor, dp * factor
                    ds = prob * (dp - delta[own])
                    dv[kv] += kept @ dout[own]
                    dk[kv] += options["scale"] * torch.where(stored > 0, ds, 0.0) @ q[own]
    return dk, dv


@pytest.mark.parametrize(
    "case", [case for case in taken() if case.name not in LONG], ids=lambda case: case.name
)
def test_tiles_of_queries_give_the_gradients_of_keys(case: Case) -> None:
    call = case.build(torch.float64, "cpu")
    dk, dv = by_column(call)
    clean = call.map(without_nan)  # NaN stands only where nothing may be read
    _, expected_dk, expected_dv, _ = reference.block_attention_backward(*clean.args, **clean.kwargs)
    # an entry is a sum over the queries of numbers that are sums over a head's size
    q, v = clean.args[2], clean.args[4]
    terms = q.shape[2] + q.shape[3] + v.shape[3]
    for found, expected in ((dk, expected_dk), (dv, expected_dv)):
        limit = torch.finfo(torch.float64).eps * terms * expected.norm()
        assert (found - expected).norm() <= limit


def test_what_reaches_the_two_passes() -> None:
    cases = {case.name: case.more_facts for case in taken()}
    blocks = {edge for facts in cases.values() for edge in facts["block_size"]}
    assert blocks >= {16, 32, 64, 128}
    assert any(facts["lengths"] for facts in cases.values())
    for low, high in ((0, 64), (64, 128), (128, 256)):
        assert any(low < facts["head_dim"] <= high for facts in cases.values()), (low, high)
    others = [facts for facts in cases.values() if facts["bias"] or not facts["tma"]]
    assert not others


def test_the_faster_kernel_comes_first() -> None:
    names = [row.name for row in KERNELS.rows["block_attention_backward"]]
    assert names[:3] == ["hopper", "hopper_two_passes", "triton"]


# --- in Triton's interpreter ----------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("count", [0, 1, 5, 150])
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_of_sequences(count: int, packed: bool) -> None:
    from sparse_layouts.kernels.block_attention.hopper_common import sequence_tiles

    draw = torch.Generator().manual_seed(count)
    mask, each = (300, 260), 330

    def numbers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=draw, dtype=torch.int32)

    q_lens, k_lens = numbers(-5, 350), numbers(-5, 350)
    starts = [n.cumsum(0).int() - n if packed else None for n in (q_lens, k_lens)]
    sequences = Sequences(starts[0], q_lens, starts[1], k_lens)
    rows = each * max(count, 1) if packed else each
    pattern = BlockPattern(*[None] * len(BlockPattern._fields))._replace(shape=mask)
    found = places(sequences, rows, rows, pattern)
    table = torch.full((count + 1, 8), -7, dtype=torch.int32)
    sequence_tiles[(1,)](
        sequences.q_starts, q_lens, sequences.k_starts, k_lens, table, count, rows, rows, *mask,
        TILE=64, BLOCK=128, KEY_TILE=128,
    )  # fmt: skip
    names = ("q_origin", "first_row", "end_row", "k_start", "num_keys")
    for column, name in zip(range(2, 7), names, strict=True):
        assert table[:count, column].tolist() == getattr(found, name).tolist(), name
    some = found.end_row > found.first_row
    tiles = torch.where(some, -(-found.end_row // 64) - found.first_row // 64, 0)
    keys = torch.where(some, -(-found.num_keys // 128), 0)
    for column, numbers_of in ((0, tiles), (7, keys)):
        before = torch.nn.functional.pad(numbers_of.cumsum(0), (1, 0))
        assert table[:, column].tolist() == before.tolist()


@pytest.mark.interpreter
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("value_dim", [8, 72, 192])
def test_terms(with_dlse: bool, value_dim: int) -> None:
    from sparse_layouts.kernels.block_attention.hopper_two_passes import terms_pass, terms_room

    draw = torch.Generator().manual_seed(value_dim)
    out, dout = (torch.randn(2, 70, 3, value_dim, generator=draw).transpose(1, 2) for _ in "ab")
    lse, dlse = (torch.randn(2, 3, 70, generator=draw) for _ in "ab")
    lse[:, 1, 5:9] = -math.inf
    terms = terms_room(out)
    terms_pass(out, dout, lse, dlse if with_dlse else None, terms).run()
    empty = lse.isneginf()
    delta = (out.double() * dout).sum(-1) - (dlse if with_dlse else 0)
    assert terms.shape == (2, 3, 70, 2)
    eps = torch.finfo(torch.float32).eps
    wanted = lse.double() * math.log2(math.e)
    assert torch.equal(terms[..., 0].isinf(), empty)
    assert (terms[..., 0] > 0)[empty].all()
    # a product of two rounded numbers
    assert ((terms[..., 0] - wanted).abs() <= 2 * eps * wanted.abs())[~empty].all()
    assert not terms[..., 1][empty].any()
    # a sum of rounded products, less one number
    size = (out.double() * dout).abs().sum(-1) + dlse.abs()
    assert ((terms[..., 1] - delta).abs() <= eps * (value_dim + 1) * size)[~empty].all()


@pytest.mark.parametrize(("queries", "keys"), [(20, 96), (96, 96), (1, 96), (20, 90)])
def test_rows_without_a_query_are_those_of_a_sequence(queries: int, keys: int) -> None:
    pytest.importorskip("triton")
    from sparse_layouts.kernels.block_attention.hopper_two_passes import without_missing_rows

    p = make_pattern(Stored((96, keys), (16, 16), blocks="causal"), random_source("missing"))
    q, dout = torch.randn(2, 2, 3, queries, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, keys, 8, dtype=torch.float64)
    sequences = without_missing_rows(q, k, p, None)
    assert (sequences is None) == (queries == 96 or keys != 96)
    head_map = torch.zeros(1, 3, dtype=torch.int32)
    rest, scale = (q, k, v, p, head_map), 0.3
    found = []
    for own in (None, sequences):
        out, lse = reference.block_attention(*rest, scale=scale, sequences=own)
        operands = (dout, None, q, k, v, out, lse, p, head_map)
        gradients = reference.block_attention_backward(*operands, scale=scale, sequences=own)
        found.append((out, lse, *gradients[:3]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
