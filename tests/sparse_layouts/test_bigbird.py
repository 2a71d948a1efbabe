"""BigBird masks: the pattern by its definition, what building costs, attention that counts."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_layouts as sl

SOURCES = ["hf-train", "hf-eval", "google"]


# --- the definition, block by block ---------------------------------------------------------------


def table_pool(i: int, table_blocks: int, block: int) -> list[int]:
    """What row i of the table over the maximum length draws from."""
    middle = list(range(1, table_blocks - 1))
    last = 1024 // block - 1 if 2 * block < 1024 else table_blocks - 1
    if i == 1:
        return middle[2:last]
    if i == 2:
        return middle[3:last]
    if i in (table_blocks - 3, table_blocks - 2):
        return middle[:last]
    s = i - 2
    if s > last:
        return middle[:last]
    return middle[:s] if i + 1 == last else middle[:s] + middle[i + 1 : last]


def random_blocks(
    nb: int, block: int, r: int, heads: int, seed: int, source: str, longest: int
) -> list[dict[int, list[int]]]:
    """Of every head: row -> its random blocks, with repetition."""
    rows = range(1, nb - 1)
    if source == "hf-eval":
        return [{i: [0] * r for i in rows} for _ in range(heads)]
    rng = np.random.RandomState(seed)
    drawn: list[dict[int, list[int]]] = [{i: [] for i in range(nb)} for _ in range(heads)]
    if nb * block in (1024, 3072, 4096) or (nb * block == 2048 and source == "google"):
        for head in drawn:
            for i in range(1, longest // block - 1):
                pool = np.array(table_pool(i, longest // block, block))
                head[i] = rng.permutation(pool)[:r].tolist()
        return drawn
    if 2 * r + 5 < nb:
        plan = {2 * r + 5: r, nb: 0}
    elif r + 5 < nb:
        plan = {r + 5: r // 2, nb: r - r // 2}
    else:
        plan = {nb: r}
    ends = list(plan)
    segments = list(zip([0, *ends[:-1]], ends, plan.values(), strict=True))
    # the upper right, the lower left, the lower right; before them the upper left
    turns = [(range(1, ends[0]), segments[0])]
    if len(ends) == 2:
        below = range(ends[0], nb)
        turns += [(range(1, ends[0]), segments[1]), (below, segments[0]), (below, segments[1])]
    for rows, (start, end, count) in turns:
        for i in rows if count else ():
            illegal = {i - 1, i, i + 1, 0, end - 1}
            illegal |= {end - 2} if i == 1 else set()
            illegal |= {1} if i == end - 2 else set()
            for head in drawn:
                order = rng.permutation(np.arange(start, end)).tolist()
                head[i] += [j for j in order if j not in illegal][:count]
    return drawn


def counts_by_definition(nb: int, drawn: list[dict[int, list[int]]]) -> Tensor:
    """(heads, nb, nb): how often each block counts."""
    counts = torch.zeros(len(drawn), nb, nb, dtype=torch.int32)
    for h, random in enumerate(drawn):
        for i in range(nb):
            stored = Counter({0, i - 1, i, i + 1, nb - 1})
            stored.update(random[i] if 0 < i < nb - 1 else [])
            if i in (0, nb - 1):
                stored = Counter(range(nb))
            for j, count in stored.items():
                if 0 <= j < nb:
                    counts[h, i, j] = count
    return counts


def counts_of(mask: sl.BSRTensor) -> Tensor:
    """(heads, nb, nb) counts, from the lists of rows."""
    p = mask.block_pattern
    assert p.block_tiles is None
    counts = torch.zeros(p.num_patterns, *p.grid, dtype=torch.int32)
    own = mask.block_counts()
    for which, crow in enumerate(p.crow_indices.tolist()):
        for i in range(p.grid[0]):
            entries = slice(crow[i], crow[i + 1])
            counts[which, i, p.col_indices[entries].long()] = 1 if own is None else own[entries]
    return counts if p.head_map is None else counts[p.head_map.long()]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("seq_len", "block", "r", "longest"),
    [
        (768, 64, 3, 4096),
        (1024, 64, 3, 4096),
        (1024, 64, 3, 1024),
        (1024, 128, 3, 4096),
        (2048, 64, 3, 4096),
        (3072, 64, 3, 4096),
        (3072, 192, 2, 4096),  # rows with a single block to draw from, which then counts twice
        (4096, 64, 3, 4096),
        (4096, 32, 5, 4096),
        (4096, 64, 0, 4096),
        (160, 16, 2, 4096),
        (8192, 64, 1, 4096),
        (400, 16, 10, 4096),  # two segments with blocks to draw
        (128, 16, 3, 4096),  # one segment
    ],
)
def test_pattern(seq_len: int, block: int, r: int, longest: int, source: str) -> None:
    mask = sl.bigbird(
        seq_len,
        block_size=block,
        num_random_blocks=r,
        num_heads=2,
        seed=5,
        source=source,
        max_seq_len=longest,
    )
    mask.validate()
    nb = seq_len // block
    single = seq_len == 3072 and block == 192
    drawn = random_blocks(nb, block, r, 2, 5, source, longest)
    if single and source != "hf-eval":
        drawn = [{i: j * (r if len(j) == 1 else 1) for i, j in head.items()} for head in drawn]
    expected = counts_by_definition(nb, drawn)
    found = counts_of(mask)
    assert torch.equal(found, expected)
    inner = found[:, 1:-1].sum(-1)  # neighbours and global blocks overlap beside the global rows
    beside = torch.tensor([4, *[5] * (nb - 4), 4])
    assert torch.equal(inner, (beside + r).int().expand(2, -1))
    assert mask.nnz == int((expected > 0).sum()) * block * block


def test_one_head_is_a_matrix() -> None:
    for source in SOURCES:
        mask = sl.bigbird(1024, source=source)
        assert mask.shape == (1024, 1024)
        both = sl.bigbird(1024, num_heads=2, source=source)
        assert both.shape == (2, 1024, 1024)
        assert torch.equal(counts_of(mask)[0], counts_of(both)[0])


def test_equal_heads_are_stored_once() -> None:
    mask = sl.bigbird(1024, num_heads=5, source="hf-eval")
    assert mask.block_pattern.num_patterns == 1
    assert mask.block_pattern.num_blocks == 100
    # few blocks to draw from: among many heads some are equal
    few = sl.bigbird(32, block_size=4, num_random_blocks=1, num_heads=200)
    p = few.block_pattern
    assert 1 < p.num_patterns < 200
    assert p.head_map is not None
    assert p.head_map[0] == 0  # numbered as they appear
    assert len(torch.unique(counts_of(few), dim=0)) == p.num_patterns
    drawn = random_blocks(8, 4, 1, 200, 0, "hf-train", 4096)
    assert torch.equal(counts_of(few), counts_by_definition(8, drawn))


@pytest.mark.parametrize("r", [0, 1, 3])
def test_the_smallest_length(r: int) -> None:
    """Four blocks: all are stored."""
    mask = sl.bigbird(16, block_size=4, num_random_blocks=r, source="hf-eval")
    expected = torch.ones(1, 4, 4, dtype=torch.int32)
    expected[:, 1:3, 0] = 1 + r
    assert torch.equal(counts_of(mask), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_without_random_blocks_nothing_is_counted(source: str) -> None:
    mask = sl.bigbird(1024, num_random_blocks=0, num_heads=3, source=source)
    assert mask.block_counts() is None
    assert mask.block_pattern.num_patterns == 1


def test_the_seed_draws() -> None:
    masks = [sl.bigbird(768, seed=seed, num_heads=2) for seed in (0, 1, 1)]
    assert not torch.equal(counts_of(masks[0]), counts_of(masks[1]))
    assert torch.equal(counts_of(masks[1]), counts_of(masks[2]))
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must stay untouched
    sl.bigbird(768)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_repr_says_what_it_is() -> None:
    assert sl.bigbird(1024, source="hf-eval").one_line() == (
        "BigBirdTensor([1024, 1024], bool, cpu, hf-eval, 3 random blocks, block 64, 100 blocks, "
        "density 39.06%)"
    )


# --- what building costs --------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the entries of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("source", SOURCES)
def test_building_takes_what_is_stored(source: str) -> None:
    with LargestTensor():  # what is imported on the way is not to be counted
        sl.bigbird(160, block_size=16, num_random_blocks=2, num_heads=2, source=source)
    blocks = 2**16 // 16
    tracemalloc.start()  # numpy's arrays
    with LargestTensor() as largest:
        mask = sl.bigbird(2**16, block_size=16, num_random_blocks=2, num_heads=2, source=source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    stored = mask.block_pattern.num_blocks
    assert stored < 2 * 9 * blocks
    assert largest.numel <= 8 * stored
    assert peak < 100 * 2 * 9 * blocks < blocks * blocks


def test_the_closed_form_reads_nothing_back() -> None:
    """On the meta device nothing can be read: building there needs no host sync."""
    mask = sl.bigbird(4096, num_heads=2, source="hf-eval", device="meta")
    assert mask.device.type == "meta"
    assert mask.block_pattern.num_blocks == 436


# --- attention, softmax ---------------------------------------------------------------------------


def keys_in_line(counts: Tensor, block: int) -> list[Tensor]:
    """For each block row of counts (nb, nb) its columns, a block's as often as it counts."""
    columns = torch.arange(counts.shape[1] * block).view(-1, block)
    return [columns.repeat_interleave(row, 0).flatten() for row in counts]


def attention_over_copies(
    q: Tensor, k: Tensor, v: Tensor, mask: sl.BSRTensor
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, N, D) as the original does it: a block drawn twice stands twice in line."""
    block, counts = mask.block_size[0], counts_of(mask)
    outs, lses = [], []
    for h in range(q.shape[1]):
        columns = keys_in_line(counts[h], block)
        for i, own in enumerate(columns):
            rows = q[:, h, i * block : (i + 1) * block]
            scores = rows @ k[:, h, own].mT / q.shape[-1] ** 0.5
            outs.append(scores.softmax(-1) @ v[:, h, own])
            lses.append(scores.logsumexp(-1))
    out = torch.stack(outs, 1).view(*q.shape[:-1], v.shape[-1])
    return out, torch.stack(lses, 1).view(q.shape[:-1])


@pytest.mark.parametrize("source", SOURCES)
def test_attention_counts(source: str, assert_close: Callable[..., None]) -> None:
    mask = sl.bigbird(40, block_size=4, num_random_blocks=2, num_heads=3, source=source, seed=1)
    if source == "google":  # drawn by plan nothing is drawn twice: a block of its own counts
        mask = sl.bigbird(1024, block_size=64, num_heads=3, source=source)
    assert (mask.block_counts() is not None) == (source != "hf-train")
    n = mask.shape[-1]
    q, k, v = (torch.randn(2, 3, n, d, dtype=torch.float64) for d in (5, 5, 6))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with sl.fallback("error"):
        out, lse = sl.attention(q, k, v, mask, return_lse=True)
        same = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected, expected_lse = attention_over_copies(q, k, v, mask)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    assert torch.equal(same, out)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), leaves)
    wanted = torch.autograd.grad((expected * dout).sum() + (expected_lse * dlse).sum(), leaves)
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w)


def test_gradcheck_of_counted_attention() -> None:
    mask = sl.bigbird(12, block_size=2, num_random_blocks=1, num_heads=2, source="hf-eval")
    leaves = [torch.randn(1, 2, 12, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return sl.attention(q, k, v, mask, return_lse=True)

    assert torch.autograd.gradcheck(attend, leaves)


def test_softmax_of_scores_counts(assert_close: Callable[..., None]) -> None:
    """`sl.sddmm`, softmax and a product are attention too: a weight is that of all copies."""
    mask = sl.bigbird(40, block_size=4, num_random_blocks=2, num_heads=2, source="hf-eval")
    q, k, v = (torch.randn(2, 40, 5, dtype=torch.float64) for _ in range(3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with sl.fallback("error"):
        p = torch.softmax(sl.sddmm(q * 5**-0.5, k.mT, mask), -1)
        found = p @ v
    assert isinstance(p, sl.BigBirdTensor)
    expected = attention_over_copies(q[None], k[None], v[None], mask)[0][0]
    assert_close(found, expected)
    assert_close(p.to_dense().sum(-1), torch.ones(2, 40, dtype=torch.float64))
    dout = torch.randn_like(found)
    for f, w in zip(
        torch.autograd.grad(found, leaves, dout),
        torch.autograd.grad(expected, leaves, dout),
        strict=True,
    ):
        assert_close(f, w)


def test_counts_travel() -> None:
    """Heads, padding by `&`, copies and the transpose keep how often a block counts."""
    mask = sl.bigbird(1024, num_heads=2, source="hf-eval")
    window = sl.causal(1024, block_size=64)
    both = mask & window
    assert torch.equal(both.to_dense(), mask.to_dense() & window.to_dense())
    assert both.block_counts() is not None
    assert torch.equal(counts_of(mask[1]), counts_of(mask)[1:])
    assert torch.equal(counts_of(mask.mT), counts_of(mask).mT)
    assert sl.without_counts(mask).block_counts() is None


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"seq_len": 1000}, ValueError, "does not divide seq_len 1000; pad the sequence to 1024"),
        ({"seq_len": 192}, ValueError, "3 blocks of 64; BigBird needs at least 4"),
        ({"seq_len": 0}, ValueError, "at least 4"),
        ({"seq_len": -64}, ValueError, "seq_len must be at least 0"),
        ({"seq_len": 1024.0}, TypeError, "seq_len is an int"),
        ({"seq_len": True}, TypeError, "seq_len is an int"),
        ({"block_size": (64, 32)}, ValueError, "expected square blocks"),
        ({"block_size": 0}, ValueError, "block_size must be positive"),
        ({"num_random_blocks": -1}, ValueError, "num_random_blocks must be at least 0"),
        ({"num_random_blocks": 1.5}, TypeError, "num_random_blocks is an int"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 2**32}, ValueError, r"seed must be below 2\*\*32"),
        ({"seed": None}, TypeError, "seed is an int"),
        ({"source": "hf"}, ValueError, "source is one of hf-train, hf-eval, google, got 'hf'"),
        ({"source": None}, ValueError, "source is one of"),
        ({"max_seq_len": 512}, ValueError, "max_seq_len 512 is shorter than seq_len 1024"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len must be at least 1"),
        # too few blocks to draw from: by plan, in the table, and beyond the length
        ({"seq_len": 448}, ValueError, "draws 3 random blocks and has 2 to draw from"),
        ({"seq_len": 4096, "block_size": 256}, ValueError, "has 0 to draw from"),
        (
            {"seq_len": 3072, "block_size": 512, "num_random_blocks": 1},
            ValueError,
            "holds block 6, and 3072 tokens have 6",
        ),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        sl.bigbird(**{"seq_len": 1024, **arguments})


def test_what_evaluation_does_not_draw_needs_no_pool() -> None:
    """The errors above name this way out."""
    assert sl.bigbird(448, source="hf-eval").shape == (448, 448)
    assert sl.bigbird(4096, block_size=256, source="hf-eval", max_seq_len=1).shape == (4096, 4096)
