"""BigBird attention on the CPU against transformers' own, without and with the rest of the layer.

The original is `BigBirdBlockSparseAttention` of the installed transformers. Its blocks are drawn as
in training or, in evaluation, all block 0. Every result is compared with the original in float64
first; the error allowed is that of the original in float32.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparse_layouts as sl
from benchmarks.timing import Row, check_error, guarded, selected
from sparse_layouts.measuring import interleaved, relative_error

RIVAL = "transformers"
BLOCK, RANDOM, HEAD_DIM, LONGEST = 64, 3, 64, 4096


class Case(NamedTuple):
    """A row: attention of q, k, v, or (`layer`) of hidden states, with the projections."""

    name: str
    train: bool
    backward: bool
    layer: bool
    padded: bool
    bar: float | None


CASES = [
    Case("bigbird attention eval", False, False, False, False, 3.0),
    Case("bigbird attention train", True, False, False, False, 3.0),
    Case("bigbird attention train +gradients", True, True, False, False, None),
    Case("bigbird layer eval", False, False, True, False, None),
    Case("bigbird layer eval, padded", False, False, True, True, None),
]
NAMES = [case.name for case in CASES]


class Effort(NamedTuple):
    """How large and how often."""

    seq_len: int = 4096
    heads: int = 12
    repeats: int = 7


QUICK = Effort(1024, 2, 3)


def run(only: Sequence[str], quick: bool, tell: Callable[[str], None]) -> list[Row]:
    """The rows whose names contain one of `only` (all without any)."""
    effort = QUICK if quick else Effort()
    names = selected(NAMES, only)
    rows: list[Row] = []
    for case in (c for c in CASES if c.name in names):
        if importlib.util.find_spec(RIVAL) is None:
            rows.append(Row(case.name, "cpu", notes=[f"needs {RIVAL}, the extra hf"]))
            continue
        rows += guarded(case.name, "cpu", attention, case, effort, tell)
    if quick:
        for row in rows:
            row.bar = None  # bars are for full sizes
    return rows


class Original:
    """transformers' attention of `heads` heads, and its masks for sequences of `lengths`."""

    def __init__(self, heads: int, train: bool, lengths: Tensor, n: int) -> None:
        from transformers import BigBirdConfig, BigBirdModel
        from transformers.models.big_bird.modeling_big_bird import BigBirdAttention

        config = BigBirdConfig(
            hidden_size=heads * HEAD_DIM,
            num_attention_heads=heads,
            block_size=BLOCK,
            num_random_blocks=RANDOM,
            max_position_embeddings=LONGEST,
        )
        torch.manual_seed(0)
        self.whole = BigBirdAttention(config, seed=0).train(train)
        tokens = (torch.arange(n) < lengths[:, None]).float()
        self.blocked, *self.masks = BigBirdModel.create_masks_for_block_sparse_attn(tokens, BLOCK)

    def layer(self, hidden: Tensor, attention: Any = None) -> Tensor:
        """The context (B, N, H * D) of hidden states, projections included."""
        own = self.whole.self if attention is None else attention
        masks = [mask.to(hidden.dtype) for mask in (*self.masks, self.blocked, self.blocked)]
        return own(hidden, *masks)[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output (B, H, N, D) of queries, keys and values of as many heads."""
        own, (batch, heads, n, d) = self.whole.self, q.shape
        masks = [mask.to(q.dtype) for mask in (*self.masks, self.blocked, self.blocked)]
        sizes = (heads, RANDOM, d, BLOCK, BLOCK, batch, n, n)
        out, _ = own.bigbird_block_sparse_attention(q, k, v, *masks, *sizes, 0, None, None)
        return out.transpose(1, 2)


def attention(case: Case, effort: Effort, tell: Callable[[str], None]) -> list[Row]:
    """One row: what is compared is what is timed."""
    from sparse_layouts.integrations.transformers import replace_bigbird_attention

    n, heads = effort.seq_len, effort.heads
    lengths = torch.tensor([n - n // 4 if case.padded else n])
    original = Original(heads, case.train, lengths, n)
    mask = sl.bigbird(
        n,
        block_size=BLOCK,
        num_random_blocks=RANDOM,
        num_heads=heads,
        source="hf-train" if case.train else "hf-eval",
        max_seq_len=LONGEST,
    )
    replaced = copy.deepcopy(original.whole)
    replace_bigbird_attention(replaced)
    draw = torch.Generator().manual_seed(0)
    shape = (1, n, heads * HEAD_DIM) if case.layer else (1, heads, n, HEAD_DIM)
    operands = [torch.randn(shape, generator=draw) for _ in range(1 if case.layer else 3)]
    dout = torch.randn(shape, generator=draw)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_(case.backward) for t in operands]
        with torch.set_grad_enabled(case.backward):
            out = attend(*leaves)
        if not case.backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def ours(*t: Tensor) -> Tensor:
        return original.layer(*t, replaced.self) if case.layer else sl.attention(*t, mask)

    theirs = original.layer if case.layer else original.attend
    row = Row(case.name, "cpu", density=mask.density, bar=case.bar)
    if not case.layer:
        row.flop = 4.0 * HEAD_DIM * mask.nnz * (3.5 if case.backward else 1)
    else:
        row.flop = 4.0 * HEAD_DIM * mask.nnz + 6.0 * n * (heads * HEAD_DIM) ** 2
    tell(f"{case.name}: comparing with float64")
    found, dense = results(ours), results(theirs)
    original.whole.double()
    exact = results(theirs, torch.float64)
    original.whole.float()
    names = ("out", "dq", "dk", "dv")
    for what, f, e, t in zip(names, found, exact, dense, strict=False):
        error, dense_error = relative_error(f, e), relative_error(t, e)
        check_error(f"{case.name}, {what}", error, dense_error, torch.float32)
        if row.error is None or error > row.error:
            row.error, row.dense_error = error, dense_error
    del found, dense, exact
    tell(f"timing {case.name}")
    times = interleaved(
        {"ours": lambda: results(ours), RIVAL: lambda: results(theirs)}, repeats=effort.repeats
    )
    row.timing, row.rivals = times["ours"], {RIVAL: times[RIVAL]}
    row.measured = row.ratios[RIVAL]
    return [row]
