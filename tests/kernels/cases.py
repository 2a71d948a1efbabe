"""Inputs for every op's kernels: patterns, operands and their strides, in any dtype on any device.

The kernel suite, the GPU tests and the benchmarks build their inputs here. These are the ops on
blocks; `ops.py` finds those of the other families. A new kernel of a known op needs nothing here.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import (
    BlockPattern,
    expand_heads,
    pack_tiles,
    transpose_pattern,
)
from sparse_layouts.dense_blocks import pattern_from_dense
from sparse_layouts.dispatch import Facts, facts_of
from sparse_layouts.kernels.block_attention import reference as attention_reference
from sparse_layouts.kernels.block_attention.sequences import Sequences
from sparse_layouts.kernels.block_softmax import reference as softmax_reference
from sparse_layouts.kernels.sddmm.reference import sample
from tests.kernels.sequence_calls import spans

Device = torch.device | str


class Call(NamedTuple):
    """The arguments of one call of a kernel."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with `change` applied to every tensor of floats, and to every dtype as to
        a tensor of it.
        """

        def mapped(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return change(torch.zeros(0, dtype=value)).dtype
            return (
                change(value) if isinstance(value, Tensor) and value.is_floating_point() else value
            )

        kwargs = {name: mapped(value) for name, value in self.kwargs.items()}
        return Call(tuple(mapped(value) for value in self.args), kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the kernel is given, those of the pattern too."""
        flat: list[Any] = []
        for value in (*self.args, *self.kwargs.values()):
            flat.extend(value if isinstance(value, (BlockPattern, Sequences)) else [value])
        return [value for value in flat if isinstance(value, Tensor)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is asked for, else the operands'."""
        if "dtype" in self.kwargs:
            return self.kwargs["dtype"]
        return next(t.dtype for t in self.tensors if t.is_floating_point())

    @property
    def pattern(self) -> BlockPattern:
        """The call's pattern."""
        return next(value for value in self.args if isinstance(value, BlockPattern))


class Case(NamedTuple):
    """A named call of one op. `small` cases also run in Triton's interpreter."""

    name: str
    build: Callable[[torch.dtype, Device], Call]
    small: bool
    more_facts: dict[str, Any]

    def facts(self, dtype: torch.dtype, device: Device) -> Facts:
        """What the choice of a kernel for this call depends on."""
        return facts_of(torch.zeros(0, dtype=dtype, device=device), **self.more_facts)


def random_source(name: str) -> torch.Generator:
    """A generator of its own for every case, so that adding one leaves the others as they are."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


# --- patterns -------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Which blocks a pattern stores.

    `blocks`: "some" (40%), "none", "gaps" (one block row and one block column without any), "all",
    "power" (one block row with all of its blocks, the others with hardly any) or "causal" (by
    token, aligned at the end). `tiles` makes half of the blocks partial, and the
    first block row one partial block with empty rows; `counts` counts blocks up to three times.
    `transposed` describes the other half of `transpose_pattern`.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    patterns: int = 1
    blocks: str = "some"
    tiles: bool = False
    counts: bool = False
    transposed: bool = False


def make_pattern(what: Stored, random: torch.Generator, device: Device = "cpu") -> BlockPattern:
    """A pattern with its own lists for each of `what.patterns` leading indices."""
    if what.transposed:
        flipped = what._replace(shape=what.shape[::-1], block=what.block[::-1], transposed=False)
        return transpose_pattern(make_pattern(flipped, random, device))
    (m, n), (bm, bn), lead = what.shape, what.block, what.patterns
    mb, nb = -(-m // bm), -(-n // bn)
    stored = torch.rand(lead, mb, nb, generator=random) < 0.4
    ids = torch.zeros(lead, mb, nb, dtype=torch.int32)
    tiles = None
    if what.blocks == "causal":
        stored, ids, tiles = _causal_blocks(what)
    elif what.blocks in ("none", "all"):
        stored = torch.full_like(stored, what.blocks == "all")
    if what.blocks == "gaps":
        stored[:, mb // 2] = False
        stored[:, :, nb // 2] = False
    elif what.blocks == "power":
        stored &= torch.rand(lead, mb, nb, generator=random) < 0.1
        stored[:, 0] = False
        stored[:, -2] = True
    elif what.blocks == "some":
        stored[:, -1, 0] = stored[:, 0, -1] = True
    if what.tiles:
        assert tiles is None, "a causal pattern has its own tiles"
        bits = torch.rand(3, bm, bn, generator=random) < 0.6
        bits[0, bm // 2 :] = False  # empty rows
        bits[1, :, bn // 2] = False  # an empty column
        bits[2] = False
        bits[2, -1, 0] = True  # one entry, and the sign bit of no word
        tiles = pack_tiles(bits)
        ids = torch.randint(0, 6, stored.shape, generator=random, dtype=torch.int32)
        ids = torch.where(ids <= 3, ids, 0)
        if what.blocks != "none":
            stored[:, 0] = False
            stored[:, 0, nb - 1] = True
            ids[:, 0, nb - 1] = 1
    blocks = stored
    if what.counts:
        blocks = stored * torch.randint(1, 4, stored.shape, generator=random)
    # one list set for every leading index, also where two happen to be equal
    pattern = pattern_from_dense(
        blocks, (bm, bn), (m, n), ids if tiles is not None else None, tiles
    )
    pattern = expand_heads(pattern)
    return moved(pattern, device)


def _causal_blocks(what: Stored) -> tuple[Tensor, Tensor, Tensor]:
    """Stored blocks, tile ids and tiles of the mask `column - (N - M) <= row`."""
    (m, n), (bm, bn), lead = what.shape, what.block, what.patterns
    mb, nb = -(-m // bm), -(-n // bn)
    rows, columns = torch.arange(mb * bm), torch.arange(nb * bn)
    entries = columns[None, :] - (n - m) <= rows[:, None]
    blocks = entries.view(mb, bm, nb, bn).transpose(1, 2).reshape(mb * nb, bm, bn)
    some, every = blocks.flatten(1).any(1), blocks.flatten(1).all(1)
    words, kind = torch.unique(pack_tiles(blocks[some & ~every]), dim=0, return_inverse=True)
    ids = torch.zeros(mb * nb, dtype=torch.int32)
    ids[some & ~every] = kind.int() + 1
    return (
        some.view(1, mb, nb).repeat(lead, 1, 1),
        ids.view(1, mb, nb).repeat(lead, 1, 1),
        words,
    )


def moved(pattern: BlockPattern, device: Device) -> BlockPattern:
    """The pattern on a device."""
    tensors = [None if t is None else t.to(device) for t in pattern[:10]]
    return BlockPattern(*tensors, *pattern[10:])  # type: ignore[arg-type]


# --- operands -------------------------------------------------------------------------------------


def laid_out(t: Tensor, how: str) -> Tensor:
    """`t` with other strides: "plain", "mT", "step" (`[..., ::2]`), "offset" (not aligned),
    "heads_last", "expand_<dim>".

    What lies between the entries of "step" is NaN. An expanded tensor repeats the first index of
    that dimension.
    """
    if how == "mT":
        return t.mT.contiguous().mT
    if how == "step":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
        wide[..., ::2] = t
        return wide[..., ::2]
    if how == "offset":
        flat = t.new_full((t.numel() + 1,), math.nan)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)
    if how == "heads_last":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how.startswith("expand_"):
        dim = int(how.removeprefix("expand_"))
        return t.narrow(dim, 0, min(1, t.shape[dim])).expand_as(t)
    assert how == "plain", how
    return t.contiguous()


class Operands(NamedTuple):
    """Makes a case's random operands: float64 from its own generator, rounded, moved, laid out."""

    random: torch.Generator
    dtype: torch.dtype
    device: Device

    def normal(self, *shape: int, how: str = "plain", dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal."""
        made = torch.randn(*shape, generator=self.random, dtype=torch.float64)
        return laid_out(made.to(dtype or self.dtype).to(self.device), how)

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of logsumexp and its gradient."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def stored_entries(pattern: BlockPattern) -> Tensor:
    """bool (S, bm, bn), by slot: which entries the pattern stores."""
    ones = torch.ones(1, pattern.num_patterns, *pattern.shape, device=pattern.device)
    return sample(ones, pattern)[0] != 0


def unread(pattern: BlockPattern) -> tuple[Tensor, Tensor]:
    """bool (P, M) and (P, N): rows and columns in which no block is stored."""
    (m, n), (bm, bn) = pattern.shape, pattern.block_size
    rows = (pattern.crow_indices.diff(dim=-1) == 0).repeat_interleave(bm, 1)[:, :m]
    columns = (pattern.ccol_indices.diff(dim=-1) == 0).repeat_interleave(bn, 1)[:, :n]
    return rows, columns


# --- block_matmul, sddmm, block_softmax -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BlockCase:
    """What the ops on values share; `width` is the dense operand's free size (matmul) or the
    contracted one (sddmm).

    `poison` puts NaN where no stored block reads; `share` gives values a batch of one; `factor`
    scales scores; `bias` and `activation` are a linear layer's.
    """

    name: str
    stored: Stored
    batch: int = 1
    width: int = 24
    values: str = "plain"
    dense: str = "plain"
    share: bool = False
    flip: bool = False
    poison: bool = False
    factor: float = 1.0
    bias: bool = False
    activation: str | None = None
    small: bool = False

    def begin(
        self, op: str, dtype: torch.dtype, device: Device
    ) -> tuple[Operands, BlockPattern, Tensor]:
        """The generator of operands, the pattern, and values (B or 1, S, bm, bn), 0 where nothing
        is stored.
        """
        random = random_source(f"{op} {self.name}")
        make = Operands(random, dtype, device)
        pattern = make_pattern(self.stored, random, device)
        shape = (1 if self.share else self.batch, pattern.num_blocks, *pattern.block_size)
        values = make.normal(*shape) * self.factor * stored_entries(pattern)
        return make, pattern, laid_out(values, self.values)

    def case(self, op: str, build: Callable[[BlockCase, torch.dtype, Device], Call]) -> Case:
        """This case for one op."""
        (m, n), (bm, bn), width = self.stored.shape, self.stored.block, self.width
        facts: dict[str, Any] = {"block_size": self.stored.block}
        if op == "block_matmul":
            facts["columns"] = 1 << (width - 1).bit_length() if width else 0
            # the row copies operands that the copy engine cannot read, the result it has to write
            facts["tma"] = (m if self.flip else width) % 8 == 0
        elif op == "sddmm":
            facts["tma"] = True
            facts["partial"] = self.stored.tiles or m % bm != 0 or n % bn != 0
        return Case(self.name, lambda dtype, device: build(self, dtype, device), self.small, facts)


BLOCK_CASES = [
    BlockCase("block16", Stored((80, 96), (16, 16)), batch=3, small=True),
    BlockCase("ragged", Stored((75, 110), (32, 32)), width=33, dense="mT", small=True),
    BlockCase("block64", Stored((192, 128), (64, 64)), width=17, values="step", dense="step"),
    BlockCase("block128", Stored((300, 260), (128, 128)), batch=3, width=70, share=True),
    BlockCase("rectangular_16x32", Stored((70, 96), (16, 32), 2), batch=2, flip=True, small=True),
    BlockCase(
        "rectangular_64x16", Stored((192, 90), (64, 16), 3), dense="expand_0", batch=3, flip=True
    ),
    BlockCase(
        "transposed_partial",
        Stored((96, 70), (32, 16), 2, tiles=True, transposed=True),
        width=40,
        values="mT",
        small=True,
    ),
    BlockCase("transposed_64", Stored((190, 200), (64, 64), 3, transposed=True), 2, 130, flip=True),
    BlockCase("partial", Stored((100, 84), (32, 32), 2, tiles=True), dense="step", small=True),
    BlockCase("partial_128", Stored((200, 190), (64, 128), tiles=True), batch=2, values="offset"),
    BlockCase("counts", Stored((64, 80), (16, 16), 2, counts=True), batch=2, small=True),
    BlockCase("partial_counts", Stored((90, 100), (32, 16), 2, tiles=True, counts=True), flip=True),
    BlockCase("no_block", Stored((64, 64), (16, 16), blocks="none"), small=True),
    BlockCase("gaps", Stored((80, 112), (16, 16), 2, blocks="gaps"), batch=2, small=True),
    BlockCase("unread_nan", Stored((112, 80), (16, 16), 2, blocks="gaps"), poison=True, small=True),
    BlockCase("all_stored", Stored((64, 96), (32, 32), blocks="all"), width=65, values="expand_0"),
    BlockCase("batch_0", Stored((64, 48), (16, 16)), batch=0, small=True),
    BlockCase("width_1", Stored((80, 70), (16, 16)), batch=2, width=1),
    BlockCase("width_0", Stored((64, 48), (16, 16)), width=0, small=True),
    BlockCase("wide", Stored((130, 140), (64, 64)), width=333, dense="offset"),
    BlockCase("expanded_gradient", Stored((96, 64), (32, 32)), batch=2, dense="expand_-1"),
    BlockCase("large_scores", Stored((64, 200), (16, 32)), factor=30.0, small=True),
    BlockCase("block5", Stored((33, 41), (5, 5), 2, tiles=True), batch=2, width=9),
    BlockCase("block24", Stored((100, 90), (24, 24)), dense="mT"),
    BlockCase("rectangular_5x48", Stored((52, 100), (5, 48), tiles=True, transposed=True)),
    # edges that tensor cores cannot take
    BlockCase("block8", Stored((72, 40), (8, 8), 2), batch=2, width=40, flip=True, small=True),
    BlockCase("rows_of_32", Stored((41, 130), (1, 32), tiles=True), batch=3, width=70, small=True),
    BlockCase("columns_of_32", Stored((100, 37), (32, 1), 2), values="mT", dense="mT", small=True),
    BlockCase(
        "rows_of_32_transposed",
        Stored((130, 41), (32, 1), 2, tiles=True, transposed=True),
        batch=2,
        share=True,
        flip=True,
        small=True,
    ),
    BlockCase("single_entries", Stored((19, 23), (1, 1), blocks="gaps"), poison=True, small=True),
    BlockCase(
        "unread_nan_24",
        Stored((130, 110), (24, 24), 2, blocks="gaps", tiles=True),
        batch=2,
        dense="step",
        poison=True,
        small=True,
    ),
    BlockCase("power_law_5", Stored((31, 403), (5, 7), blocks="power"), width=3, small=True),
    BlockCase("no_block_12", Stored((36, 30), (12, 6), blocks="none"), small=True),
    BlockCase("width_0_12", Stored((36, 30), (12, 6)), width=0, small=True),
]

# a linear layer's bias and activation, which block_matmul alone has
LINEAR_CASES = [
    BlockCase("bias", Stored((75, 110), (32, 32)), width=33, dense="mT", bias=True, small=True),
    BlockCase("relu", Stored((80, 96), (16, 16), 2), batch=2, activation="relu", small=True),
    BlockCase(
        "bias_relu",
        Stored((80, 112), (16, 16), 2, blocks="gaps"),
        batch=2,
        flip=True,
        bias=True,
        activation="relu",
        small=True,
    ),
    BlockCase(
        "bias_gelu",
        Stored((70, 96), (32, 16), transposed=True),
        dense="mT",
        flip=True,
        bias=True,
        activation="gelu",
        small=True,
    ),
    BlockCase(
        "bias_gelu_tanh",
        Stored((190, 200), (64, 64)),
        width=130,
        flip=True,
        bias=True,
        activation="gelu_tanh",
    ),
    BlockCase("gelu_tanh", Stored((40, 48), (16, 16)), activation="gelu_tanh", small=True),
    BlockCase(
        "bias_silu",
        Stored((300, 260), (128, 128)),
        batch=2,
        share=True,
        width=70,
        bias=True,
        activation="silu",
    ),
    BlockCase("silu", Stored((40, 48), (16, 16)), activation="silu", small=True),
    BlockCase(
        "bias_gelu_5",
        Stored((43, 31), (5, 5), 2, blocks="gaps"),
        batch=2,
        dense="mT",
        flip=True,
        bias=True,
        activation="gelu",
        poison=True,
        small=True,
    ),
    BlockCase("bias_silu_1x32", Stored((50, 96), (1, 32)), width=70, bias=True, activation="silu"),
    BlockCase(
        "bias_no_block",
        Stored((64, 64), (16, 16), blocks="none"),
        bias=True,
        activation="gelu",
        small=True,
    ),
]

# products with few columns, in which rows are cut into pieces
FEW_COLUMN_CASES = [
    BlockCase(
        "power_law",
        Stored((90, 1050), (16, 16), blocks="power"),
        width=7,
        dense="mT",
        bias=True,
        activation="relu",
        small=True,
    ),
    BlockCase(
        "power_law_64",
        Stored((300, 4200), (64, 64), 2, blocks="power"),
        batch=2,
        width=1,
        flip=True,
    ),
    BlockCase(
        "power_law_transposed",
        Stored((1050, 100), (32, 16), blocks="power", transposed=True),
        width=9,
        dense="mT",
        flip=True,
        small=True,
    ),
    BlockCase(
        "cut_wide_product",
        Stored((32, 2000), (16, 16), blocks="all"),
        width=150,
        dense="mT",
        bias=True,
        activation="silu",
        small=True,
    ),
    BlockCase(
        "cut_wide_product_64", Stored((64, 4096), (64, 64), blocks="all"), width=200, batch=2
    ),
    BlockCase("power_law_128", Stored((400, 6000), (128, 128), blocks="power"), width=64),
    BlockCase("power_law_wide_blocks", Stored((64, 4096), (16, 64), blocks="power"), width=16),
    BlockCase(
        "power_law_nan",
        Stored((80, 1024), (16, 16), 2, blocks="gaps"),
        batch=2,
        width=3,
        dense="step",
        poison=True,
        small=True,
    ),
    BlockCase("few_long_rows", Stored((16, 1600), (16, 16), blocks="all"), width=2, small=True),
    BlockCase(
        "few_long_rows_transposed",
        Stored((32, 1600), (16, 16), blocks="all", transposed=True),
        width=5,
        flip=True,
        small=True,
    ),
    BlockCase("few_long_rows_64", Stored((64, 6400), (64, 64), blocks="all"), width=48, share=True),
    BlockCase("few_columns_tall", Stored((512, 512), (256, 32)), batch=2, width=33, values="mT"),
    BlockCase(
        "few_columns_partial", Stored((200, 1000), (64, 32), 2, tiles=True), width=8, dense="mT"
    ),
]

# 33 to 64 columns, blocks from 64, steps of 16 bytes: one of Hopper's kernels cuts the list evenly
FEW_COLUMN_CASES += [
    BlockCase("even_64", Stored((192, 320), (64, 64)), width=33, dense="mT", flip=True),
    BlockCase("even_64_rows_of_x", Stored((320, 192), (64, 64)), batch=2, width=48),
    BlockCase("even_64_wide_rows_of_x", Stored((320, 192), (64, 64)), width=40),
    BlockCase("even_128", Stored((384, 640), (128, 128), 2), batch=3, width=64, dense="mT"),
    BlockCase("even_256", Stored((512, 768), (256, 256)), width=33, dense="mT", flip=True),
    BlockCase("even_wide", Stored((192, 1024), (64, 256)), batch=2, width=56),
    BlockCase(
        "even_power_law",
        Stored((1280, 4160), (64, 64), 2, blocks="power"),
        batch=2,
        share=True,
        width=45,
        dense="mT",
        flip=True,
    ),
    BlockCase(
        "even_power_law_128",
        Stored((1280, 8320), (128, 128), blocks="power"),
        width=35,
        dense="mT",
        flip=True,
        bias=True,
        activation="gelu",
    ),
    BlockCase(
        "even_transposed",
        Stored((1280, 4160), (64, 128), 2, blocks="power", transposed=True),
        width=37,
        values="mT",
        dense="mT",
        flip=True,
    ),
    BlockCase(
        "even_transposed_128",
        Stored((1408, 4224), (128, 128), transposed=True),
        width=64,
        values="mT",
    ),
    BlockCase(
        "even_transposed_256",
        Stored((512, 768), (256, 256), transposed=True),
        width=40,
        values="mT",
    ),
    BlockCase("even_steps", Stored((192, 256), (64, 64), 2), batch=2, width=40, dense="step"),
    BlockCase("even_slots", Stored((1280, 4160), (64, 64), transposed=True), width=48),
    BlockCase("even_long_row", Stored((64, 32768), (64, 64), blocks="all"), width=40, dense="mT"),
    BlockCase(
        "even_gaps",
        Stored((200, 456), (64, 64), 2, blocks="gaps"),
        width=34,
        dense="mT",
        flip=True,
        bias=True,
        activation="relu",
        poison=True,
    ),
    BlockCase(
        "even_many_gaps",
        Stored((12800, 64), (64, 64)),
        width=64,
        dense="mT",
        flip=True,
        bias=True,
        activation="silu",
    ),
]

# what Hopper's kernels take: blocks from 64, many columns, results in steps of 16 bytes
HOPPER_CASES = [
    BlockCase("hopper_64", Stored((192, 320), (64, 64)), batch=2, width=264),
    BlockCase("hopper_128", Stored((384, 256), (128, 128), 2), batch=3, width=256, share=True),
    BlockCase(
        "hopper_transposed",
        Stored((320, 192), (64, 64), transposed=True),
        width=392,
        values="mT",
        dense="mT",
        flip=True,
    ),
    BlockCase(
        "hopper_transposed_128",
        Stored((256, 640), (128, 128), 2, transposed=True),
        width=136,
        dense="mT",
        flip=True,
    ),
    BlockCase("hopper_tall", Stored((512, 192), (256, 64)), width=200, values="mT"),
    BlockCase("hopper_wide", Stored((192, 512), (64, 256)), batch=2, width=520, dense="expand_0"),
    BlockCase(
        "hopper_gaps", Stored((384, 448), (64, 64), 2, blocks="gaps"), width=144, poison=True
    ),
    BlockCase("hopper_power", Stored((512, 2048), (64, 64), blocks="power"), width=160, dense="mT"),
    BlockCase("hopper_all", Stored((128, 256), (64, 64), blocks="all"), width=520, flip=True),
    BlockCase("hopper_many_rows", Stored((9024, 128), (64, 64)), width=264, dense="mT", flip=True),
    BlockCase("hopper_many_rows_128", Stored((8960, 256), (128, 128)), width=520),
    BlockCase(
        "hopper_many_rows_transposed", Stored((8576, 128), (64, 64), transposed=True), width=376
    ),
    BlockCase("hopper_one_block", Stored((128, 128), (128, 128), blocks="all"), width=176),
    # operands that are copied first
    BlockCase("hopper_steps", Stored((192, 256), (64, 64), 2), batch=2, width=264, dense="step"),
    BlockCase(
        "hopper_offset", Stored((256, 256), (128, 128)), width=200, values="offset", dense="offset"
    ),
    BlockCase(
        "hopper_steps_expanded",
        Stored((192, 128), (64, 64)),
        batch=3,
        width=264,
        values="step",
        dense="expand_0",
    ),
    BlockCase("hopper_one_column", Stored((192, 128), (64, 64)), width=136, dense="expand_-1"),
    BlockCase("hopper_odd_steps", Stored((192, 256), (64, 128)), width=301, flip=True),
]
# for products alone
HOPPER_LINEAR_CASES = [
    BlockCase("hopper_ragged", Stored((200, 250), (64, 64)), width=264),
    BlockCase(
        "hopper_ragged_flip", Stored((200, 136), (64, 128)), width=301, dense="mT", flip=True
    ),
    BlockCase(
        "hopper_bias_gelu",
        Stored((200, 256), (64, 64)),
        width=300,
        dense="mT",
        flip=True,
        bias=True,
        activation="gelu",
    ),
    BlockCase(
        "hopper_bias_relu",
        Stored((256, 384), (128, 128), blocks="gaps"),
        width=136,
        bias=True,
        activation="relu",
    ),
    BlockCase("hopper_silu", Stored((256, 128), (64, 64)), width=136, activation="silu"),
    BlockCase(
        "hopper_bias_gelu_tanh",
        Stored((256, 256), (256, 128), transposed=True),
        width=256,
        dense="mT",
        flip=True,
        bias=True,
        activation="gelu_tanh",
    ),
]

SDDMM_CASES = [*BLOCK_CASES, *HOPPER_CASES]
MATMUL_CASES = [
    *BLOCK_CASES,
    *LINEAR_CASES,
    *FEW_COLUMN_CASES,
    *HOPPER_CASES,
    *HOPPER_LINEAR_CASES,
]
# a softmax has no other operand
SOFTMAX_CASES = [
    c for c in BLOCK_CASES if not c.name.startswith("wi") and not c.poison and not c.share
]


def build_block_matmul(case: BlockCase, dtype: torch.dtype, device: Device) -> Call:
    """`flip` asks for a transposed output."""
    kwargs: dict[str, Any] = {"transposed_output": case.flip}
    make, pattern, values = case.begin("block_matmul", dtype, device)
    k = pattern.shape[1]
    x = make.normal(case.batch, pattern.num_patterns, k, case.width, how=case.dense)
    if case.poison:
        x = x.masked_fill(unread(pattern)[1][None, :, :, None], math.nan)
    if case.bias:
        kwargs["bias"] = make.normal(pattern.shape[0])
    if case.activation is not None:
        kwargs["activation"] = case.activation
    return Call((values, pattern, x), kwargs)


def build_sddmm(case: BlockCase, dtype: torch.dtype, device: Device) -> Call:
    """`dense` gives a's strides, `values` b's."""
    make, pattern, _ = case.begin("sddmm", dtype, device)
    (m, n), lead = pattern.shape, pattern.num_patterns
    a = make.normal(case.batch, lead, m, case.width, how=case.dense)
    b = make.normal(case.batch, lead, case.width, n, how=case.values)
    if case.poison:
        rows, columns = unread(pattern)
        a = a.masked_fill(rows[None, :, :, None], math.nan)
        b = b.masked_fill(columns[None, :, None, :], math.nan)
    return Call((a, b, pattern), {})


def build_block_softmax(case: BlockCase, dtype: torch.dtype, device: Device) -> Call:
    """`flip` asks for the logarithm."""
    _, pattern, values = case.begin("block_softmax", dtype, device)
    return Call((values, pattern), {"log": case.flip})


def build_block_softmax_backward(case: BlockCase, dtype: torch.dtype, device: Device) -> Call:
    """The forward's result is the reference's, rounded; `dense` gives the gradient's strides."""
    make, pattern, values = case.begin("block_softmax", dtype, device)
    out = softmax_reference.block_softmax(values.double(), pattern, log=case.flip).to(dtype)
    grad = make.normal(*values.shape, how=case.dense)
    return Call((grad, laid_out(out, case.values), pattern), {"log": case.flip})


# --- block_attention ------------------------------------------------------------------------------


class Lying(NamedTuple):
    """Where sequences lie in operands of `rows` rows of q and of k a sample.

    `spans`: (first query, queries, first key, keys) of each; padded if the first query is None.
    """

    spans: tuple[tuple[int | None, int, int, int], ...]
    rows: tuple[int, int]
    packed: bool

    def on(self, device: Device) -> Sequences:
        """As kernels take them; starts that are all 0 as None."""

        def column(i: int) -> Tensor:
            numbers = [span[i] or 0 for span in self.spans]
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        k_starts = column(2) if self.packed or any(span[2] for span in self.spans) else None
        return Sequences(column(0) if self.packed else None, column(1), k_starts, column(3))

    def unread(self, mask: tuple[int, int], device: Device) -> tuple[Tensor, Tensor]:
        """bool (samples, 1, rows): what nobody reads of q, and of k and v, under such a mask."""
        samples = 1 if self.packed else len(self.spans)
        of_q, of_k = (torch.ones(samples, 1, n, dtype=torch.bool) for n in self.rows)
        for span in spans(self.on("cpu"), *self.rows, mask):
            of_q[span.sample, :, span.queries.start : span.queries.stop] = False
            of_k[span.sample, :, span.keys.start : span.keys.stop] = False
        return of_q.to(device), of_k.to(device)


def packed(*pairs: tuple[int, int], gap: int = 0) -> Lying:
    """Sequences of (queries, keys), one after another, `gap` rows of none before and after each."""
    found = []
    q, k = gap, gap
    for queries, keys in pairs:
        found.append((q, queries, k, keys))
        q, k = q + queries + gap, k + keys + gap
    return Lying(tuple(found), (q, k), True)


def padded(*pairs: tuple[int, int], rows: tuple[int, int], left: bool = False) -> Lying:
    """Samples of (queries, keys) in `rows`, keys at the end where the padding is `left`."""
    return Lying(
        tuple((None, queries, rows[1] - keys if left else 0, keys) for queries, keys in pairs),
        rows,
        False,
    )


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Operands of attention.

    `sequences` says where several of them lie, instead of `batch` and `queries`; then NaN stands in
    every row of q, k, v and dout that belongs to none or is not in the pattern. `heads_read`: which
    list set a head reads: "one" (all the first), "own" (head by head), "kv" (by KV head) or
    "sample" (drawn for every sample and head). `bias`: None, "shared" (by heads that share a
    pattern, and by samples) or "own". `poison` puts NaN into k and v where no head reads. `how`
    gives the strides of q, k, v and dout. `queries` below the mask's rows are its last ones.
    """

    name: str
    stored: Stored
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    queries: int | None = None
    head_dim: int = 32
    value_dim: int | None = None
    heads_read: str = "one"
    how: tuple[str, str, str, str] = ("plain",) * 4
    scale: float | None = None
    factor: float = 1.0
    bias: str | None = None
    bias_factor: float = 1.0
    bias_shift: float = 0.0
    dropout: float = 0.0
    dlse: bool = True
    poison: bool = False
    sequences: Lying | None = None
    small: bool = False

    @property
    def patterns(self) -> int:
        """How many samples may have a pattern of their own."""
        return self.batch if self.sequences is None else len(self.sequences.spans)

    @property
    def samples(self) -> int:
        """The operands' batch."""
        return 1 if self.sequences is not None and self.sequences.packed else self.patterns

    def head_map(self, random: torch.Generator) -> Tensor:
        """int32 (B or 1, H)."""
        lists, kv_heads = self.stored.patterns, self.kv_heads or self.heads
        if self.heads_read == "sample":
            drawn = torch.randint(0, lists, (self.patterns, self.heads), generator=random)
            return drawn.int()
        if self.heads_read == "kv":
            own = torch.arange(kv_heads).repeat_interleave(self.heads // kv_heads)
        elif self.heads_read == "own":
            own = torch.arange(self.heads)
        else:
            own = torch.zeros(self.heads)
        return (own[None] % lists).int()

    def build_forward(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of block_attention."""
        return self._build(dtype, device)[0]

    def build_backward(self, dtype: torch.dtype, device: Device) -> Call:
        """A call of the backward op; the forward's results are the reference's, rounded."""
        forward, make = self._build(dtype, device)
        clean = forward.map(lambda t: t.double().nan_to_num(0.0))
        out, lse = attention_reference.block_attention(*clean.args, **clean.kwargs)
        q, k, v, pattern, head_map = forward.args
        dout = make.normal(*out.shape)
        dlse = make.normal(*lse.shape, dtype=make.accumulator) if self.dlse else None
        if self.sequences is not None:
            nobody = self.sequences.unread(pattern.shape, device)[0]
            dout = dout.masked_fill(nobody[..., None], math.nan)
            dlse = None if dlse is None else dlse.masked_fill(nobody, math.nan)
        dout = laid_out(dout, self.how[3])
        kwargs = dict(forward.kwargs)
        if self.bias is not None:
            kwargs["dbias_base"], kwargs["dbias_blocks"] = own_slots(pattern, head_map)
        results = (out.to(dtype), lse.to(make.accumulator))
        return Call((dout, dlse, q, k, v, *results, pattern, head_map), kwargs)

    def _build(self, dtype: torch.dtype, device: Device) -> tuple[Call, Operands]:
        random = random_source(f"block_attention {self.name}")
        make = Operands(random, dtype, device)
        pattern = make_pattern(self.stored, random, device)
        head_map = self.head_map(random).to(device)
        (m, n), kv_heads = self.stored.shape, self.kv_heads or self.heads
        nq = m if self.queries is None else self.queries
        if self.sequences is not None:
            nq, n = self.sequences.rows
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        q = make.normal(self.samples, self.heads, nq, self.head_dim) * self.factor
        k = make.normal(self.samples, kv_heads, n, self.head_dim)
        v = make.normal(self.samples, kv_heads, n, value_dim)
        if self.sequences is not None:
            no_query, no_key = self.sequences.unread(pattern.shape, device)
            q = q.masked_fill(no_query[..., None], math.nan)
            k, v = (x.masked_fill(no_key[..., None], math.nan) for x in (k, v))
        q, k, v = (laid_out(x, how) for x, how in zip((q, k, v), self.how, strict=False))
        if self.poison:
            nobody = unread(pattern)[1][head_map.long()]  # (B or 1, H, N)
            nobody = nobody.unflatten(1, (kv_heads, -1)).all(2)[..., None]
            k, v = k.masked_fill(nobody, math.nan), v.masked_fill(nobody, math.nan)
        scale = 1.0 / math.sqrt(max(self.head_dim, 1)) if self.scale is None else self.scale
        kwargs: dict[str, Any] = {"scale": scale}
        if self.sequences is not None:
            kwargs["sequences"] = self.sequences.on(device)
        if self.dropout:
            kwargs["dropout_p"] = self.dropout
            kwargs["seed"] = torch.tensor([0x1234_5678_9ABC], dtype=torch.int64, device=device)
        if self.bias is not None:
            samples = 1
            if self.bias == "shared":
                base, slots = pattern.crow_indices[:, 0].long()[head_map.long()], pattern.num_blocks
            else:
                base, slots = own_slots(pattern, head_map)
                samples = max(self.patterns, 1) if head_map.shape[0] == 1 else 1
            bias = make.normal(samples, slots, *pattern.block_size)
            kwargs["bias"] = bias * self.bias_factor + self.bias_shift
            kwargs["bias_base"] = base
        return Call((q, k, v, pattern, head_map), kwargs), make

    def case(self, op: str) -> Case:
        """This case for the forward or the backward op."""
        build = self.build_backward if op.endswith("backward") else self.build_forward
        sizes = (self.head_dim, self.head_dim if self.value_dim is None else self.value_dim)
        facts = {"block_size": self.stored.block, "head_dim": max(sizes)}
        facts |= {"bias": self.bias is not None, "lengths": self.sequences is not None}
        # rows of 16-bit numbers, in steps of 16 bytes
        aligned = all(size > 0 and size % 8 == 0 for size in sizes)
        facts["tma"] = aligned and set(self.how[:3]) <= {"plain", "heads_last"}
        return Case(self.name, build, self.small, facts)


def own_slots(pattern: BlockPattern, head_map: Tensor) -> tuple[Tensor, int]:
    """(B or 1, H) int64 and their number: slots that no head and, with a pattern a sample, no
    sample shares.
    """
    lengths = (pattern.crow_indices[:, -1] - pattern.crow_indices[:, 0]).long()
    lengths = lengths[head_map.long()]
    ends = lengths.flatten().cumsum(0).view(lengths.shape)
    return ends - lengths, int(ends[-1, -1]) if ends.numel() else 0


CAUSAL_50 = Stored((50, 50), (16, 16), blocks="causal")
STRIDED = ("mT", "step", "mT", "step")
TOKENS_FIRST = ("heads_last",) * 4

ATTENTION_CASES = [
    AttentionCase("causal", CAUSAL_50, head_dim=16, small=True),
    AttentionCase("no_lse_gradient", CAUSAL_50, batch=2, dlse=False, how=TOKENS_FIRST, small=True),
    AttentionCase(
        "strided",
        Stored((80, 75), (32, 32), 2),
        heads_read="own",
        head_dim=24,
        how=STRIDED,
        small=True,
    ),
    AttentionCase(
        "grouped_heads",
        Stored((64, 64), (16, 16), 4, tiles=True),
        heads=4,
        kv_heads=2,
        heads_read="own",
        how=TOKENS_FIRST,
        small=True,
    ),
    AttentionCase(
        "one_kv_head",
        Stored((130, 130), (64, 64), 4, blocks="gaps"),
        3,
        4,
        1,
        heads_read="own",
        head_dim=64,
    ),
    AttentionCase(
        "pattern_by_kv_head", Stored((96, 96), (32, 32), 2), 2, 4, 2, heads_read="kv", head_dim=40
    ),
    AttentionCase(
        "pattern_by_sample",
        Stored((64, 96), (32, 32), 3, tiles=True),
        3,
        heads_read="sample",
        small=True,
    ),
    AttentionCase(
        "last_queries",
        Stored((203, 203), (32, 32), blocks="causal"),
        queries=37,
        head_dim=16,
        small=True,
    ),
    AttentionCase(
        "last_queries_64",
        Stored((300, 260), (64, 64), 2),
        2,
        queries=101,
        heads_read="own",
        head_dim=64,
    ),
    AttentionCase("last_query", Stored((140, 140), (16, 16), tiles=True), batch=3, queries=1),
    AttentionCase("no_query", CAUSAL_50, queries=0, small=True),
    AttentionCase("head_size_80", Stored((150, 150), (64, 64), blocks="causal"), head_dim=80),
    AttentionCase("head_size_96_40", Stored((90, 120), (32, 32)), head_dim=96, value_dim=40),
    AttentionCase(
        "head_size_24_72", Stored((60, 60), (16, 16)), head_dim=24, value_dim=72, small=True
    ),
    AttentionCase(
        "head_size_128", Stored((300, 270), (128, 128), tiles=True), heads=1, head_dim=128
    ),
    AttentionCase(
        "head_size_256", Stored((140, 130), (64, 64), blocks="causal"), heads=1, head_dim=256
    ),
    AttentionCase(
        "rectangular_16x32", Stored((70, 100), (16, 32), 2), heads_read="own", small=True
    ),
    AttentionCase(
        "long_lists_64",
        Stored((1500, 1400), (64, 64), 2, tiles=True),
        2,
        4,
        2,
        heads_read="kv",
        head_dim=128,
        how=TOKENS_FIRST,
    ),
    AttentionCase(
        "long_lists_128",
        Stored((1500, 1500), (128, 128), 3, blocks="causal"),
        heads=3,
        heads_read="own",
        head_dim=64,
        queries=1111,
    ),
    AttentionCase(
        "long_lists_16",
        Stored((700, 650), (16, 16), 2, tiles=True),
        2,
        4,
        1,
        heads_read="sample",
        head_dim=128,
        queries=395,
    ),
    AttentionCase(
        "long_lists_32x128",
        Stored((600, 1300), (32, 128), 2, tiles=True, counts=True),
        heads_read="own",
        head_dim=64,
    ),
    AttentionCase(
        "long_lists_192",
        Stored((700, 700), (64, 64), 2, blocks="causal"),
        heads=4,
        kv_heads=2,
        heads_read="kv",
        head_dim=192,
        value_dim=128,
    ),
    AttentionCase(
        "long_dropout",
        Stored((900, 900), (64, 64), 2, blocks="causal", counts=True),
        heads=4,
        kv_heads=2,
        heads_read="kv",
        head_dim=128,
        dropout=0.2,
    ),
    AttentionCase("rectangular_64x16", Stored((150, 90), (64, 16)), 2, head_dim=64, queries=93),
    AttentionCase("rectangular_128x32", Stored((260, 100), (128, 32), tiles=True), head_dim=64),
    AttentionCase(
        "transposed",
        Stored((90, 64), (32, 16), 2, tiles=True, transposed=True),
        heads_read="own",
        bias="own",
        small=True,
    ),
    AttentionCase("partial_128", Stored((250, 200), (128, 128), 2, tiles=True), heads_read="own"),
    AttentionCase(
        "counts", Stored((64, 80), (16, 16), 2, counts=True), heads_read="own", small=True
    ),
    AttentionCase("partial_counts", Stored((150, 128), (64, 64), tiles=True, counts=True), batch=2),
    AttentionCase("no_block", Stored((64, 64), (16, 16), blocks="none"), bias="own", small=True),
    AttentionCase("gaps", Stored((112, 112), (16, 16), 2, blocks="gaps"), 2, heads_read="own"),
    AttentionCase(
        "unread_nan",
        Stored((80, 112), (16, 16), 2, blocks="gaps"),
        heads=4,
        kv_heads=2,
        heads_read="kv",
        poison=True,
        small=True,
    ),
    AttentionCase("all_stored", Stored((96, 64), (32, 32), blocks="all"), how=("offset",) * 4),
    AttentionCase("batch_0", CAUSAL_50, batch=0, small=True),
    AttentionCase("batch_0_bias", CAUSAL_50, batch=0, bias="own"),
    AttentionCase("scale", Stored((64, 64), (32, 32)), scale=0.7, head_dim=16),
    AttentionCase("large_scores", Stored((64, 130), (32, 64)), factor=12.0, head_dim=64),
    AttentionCase(
        "expanded",
        CAUSAL_50,
        3,
        4,
        how=("expand_0", "expand_1", "expand_0", "expand_-1"),
        small=True,
    ),
    AttentionCase("shared_bias", CAUSAL_50, batch=2, bias="shared", small=True),
    AttentionCase(
        "own_bias",
        Stored((130, 130), (64, 64), 2, tiles=True),
        2,
        4,
        2,
        heads_read="own",
        bias="own",
    ),
    AttentionCase(
        "bias_by_sample",
        Stored((64, 64), (16, 16), 3),
        2,
        heads_read="sample",
        bias="own",
        queries=41,
    ),
    # in rows before the first query, which nobody reads, exp of it is infinite
    AttentionCase("large_bias", CAUSAL_50, queries=13, bias="own", bias_factor=40.0, small=True),
    AttentionCase("dropout", CAUSAL_50, batch=2, dropout=0.3, small=True),
    AttentionCase(
        "dropout_64", Stored((200, 150), (64, 64)), 2, dropout=0.1, head_dim=64, queries=77
    ),
    AttentionCase(
        "everything",
        Stored((118, 128), (32, 64), 3, tiles=True, counts=True),
        2,
        4,
        2,
        95,
        48,
        heads_read="sample",
        bias="own",
        dropout=0.25,
        how=STRIDED,
        small=True,
    ),
    AttentionCase(
        "block5",
        Stored((33, 41), (5, 5), 2, tiles=True),
        2,
        heads_read="own",
        dropout=0.2,
        bias="own",
    ),
    AttentionCase("block24", Stored((100, 90), (24, 24), counts=True), queries=59, dropout=0.2),
]

CAUSAL_70 = Stored((70, 70), (16, 16), blocks="causal")
# self-attention, a chunk after 23 keys, none, no keys, one query, queries before the first key
MANY = ((50, 50), (19, 42), (0, 0), (7, 0), (1, 33), (60, 48), (0, 5))
ALL_OF_THREE = (MANY[0], MANY[1], MANY[5])

SEQUENCE_CASES = [
    AttentionCase("packed", CAUSAL_70, sequences=packed(*MANY), how=TOKENS_FIRST, small=True),
    AttentionCase(
        "packed_gaps",
        Stored((90, 90), (32, 32), 2, tiles=True),
        heads=4,
        kv_heads=2,
        heads_read="kv",
        sequences=packed(*MANY, gap=3),
        small=True,
    ),
    AttentionCase(
        "packed_64",
        Stored((300, 300), (64, 64), 4, blocks="gaps", tiles=True),
        heads=4,
        kv_heads=1,
        heads_read="own",
        head_dim=64,
        sequences=packed((300, 300), (3, 5), (100, 290), (64, 64), *((1, n) for n in range(40))),
    ),
    AttentionCase(
        "packed_full",
        Stored((150, 150), (32, 32), blocks="all"),
        heads=1,
        head_dim=16,
        sequences=packed(*ALL_OF_THREE),
        small=True,
    ),
    AttentionCase(
        "packed_pattern_by_sample",
        Stored((64, 64), (16, 16), 3, tiles=True, counts=True),
        heads_read="sample",
        sequences=packed((40, 40), (9, 64), (64, 64), (0, 0)),
        small=True,
    ),
    AttentionCase(
        "packed_rectangular",
        Stored((128, 96), (16, 32), 2, tiles=True),
        heads_read="own",
        how=STRIDED,
        sequences=packed((80, 90), (33, 60), (96, 96)),
    ),
    AttentionCase(
        "packed_64x16",
        Stored((200, 180), (64, 16), 2),
        heads_read="own",
        head_dim=64,
        sequences=packed((150, 170), (33, 60)),
    ),
    AttentionCase(
        "packed_long",
        Stored((1100, 1100), (64, 64), 2, blocks="causal"),
        heads=4,
        kv_heads=2,
        heads_read="kv",
        head_dim=128,
        sequences=packed((1000, 1000), (130, 700), (3, 3), (0, 0), (300, 1090), gap=5),
    ),
    AttentionCase(
        "packed_decoding",
        Stored((200, 200), (16, 16), 2, tiles=True),
        heads=4,
        kv_heads=2,
        heads_read="kv",
        how=TOKENS_FIRST,
        sequences=packed((1, 200), (1, 1), (1, 17), (0, 30), (1, 64), (2, 130)),
        small=True,
    ),
    AttentionCase("one_sequence", CAUSAL_70, sequences=packed((33, 57)), dlse=False, small=True),
    AttentionCase("no_sequence", CAUSAL_70, sequences=packed(gap=5), bias="shared", small=True),
    AttentionCase("no_sequence_no_bias", CAUSAL_70, sequences=packed(gap=5), small=True),
    AttentionCase("packed_no_rows", CAUSAL_70, sequences=packed((0, 0), (0, 0)), small=True),
    AttentionCase("packed_no_keys", CAUSAL_70, sequences=packed((5, 0), (3, 0)), small=True),
    AttentionCase(
        "packed_no_block", Stored((64, 64), (16, 16), blocks="none"), sequences=packed((30, 40))
    ),
    AttentionCase(
        "packed_head_size_128",
        Stored((300, 300), (128, 128), tiles=True),
        heads=1,
        head_dim=128,
        sequences=packed((130, 290), (140, 140)),
    ),
    AttentionCase(
        "packed_head_size_256",
        Stored((140, 140), (64, 64), blocks="causal"),
        heads=1,
        head_dim=256,
        sequences=packed((30, 140), (100, 100)),
    ),
    AttentionCase(
        "packed_head_size_80_40",
        Stored((90, 90), (32, 32)),
        head_dim=80,
        value_dim=40,
        sequences=packed((30, 90), (61, 61)),
    ),
    AttentionCase(
        "packed_bias",
        CAUSAL_70,
        bias="shared",
        sequences=packed((50, 50), (19, 42), (60, 48)),
        small=True,
    ),
    # next to these scores a key that is not there, whose score is 0, would be infinitely probable
    AttentionCase(
        "packed_low_scores",
        Stored((80, 80), (32, 32), blocks="all"),
        heads=1,
        head_dim=16,
        bias="own",
        bias_shift=-200.0,
        sequences=packed((50, 50), (19, 42)),
        small=True,
    ),
    AttentionCase(
        "packed_large_bias",
        CAUSAL_70,
        bias="own",
        bias_factor=40.0,
        sequences=packed((50, 50), (19, 42)),
        small=True,
    ),
    AttentionCase(
        "packed_everything",
        Stored((118, 128), (32, 64), 3, tiles=True, counts=True),
        heads=4,
        kv_heads=2,
        head_dim=48,
        heads_read="sample",
        bias="own",
        dropout=0.25,
        how=STRIDED,
        sequences=packed((95, 118), (20, 70), (64, 64), gap=1),
        small=True,
    ),
    AttentionCase(
        "padded", CAUSAL_70, how=TOKENS_FIRST, sequences=padded(*MANY, rows=(65, 60)), small=True
    ),
    AttentionCase(
        "left_padded",
        Stored((80, 80), (32, 32), 2, tiles=True),
        heads_read="own",
        sequences=padded((75, 75), (75, 40), (75, 1), (75, 0), rows=(75, 75), left=True),
        small=True,
    ),
    AttentionCase(
        "padded_64",
        Stored((300, 300), (64, 64), 3, tiles=True),
        heads=4,
        kv_heads=2,
        head_dim=64,
        heads_read="sample",
        sequences=padded((101, 270), (77, 77), (1, 300), (150, 160), rows=(150, 333), left=True),
    ),
    AttentionCase(
        "padded_own_bias",
        Stored((130, 130), (64, 64), 2, tiles=True),
        heads=4,
        kv_heads=2,
        heads_read="own",
        bias="own",
        sequences=padded((130, 130), (60, 100), (100, 60), rows=(130, 140)),
    ),
    AttentionCase(
        "padded_dropout",
        Stored((150, 150), (64, 64)),
        head_dim=64,
        dropout=0.1,
        sequences=padded((77, 140), (150, 150), (20, 20), rows=(150, 150)),
    ),
    AttentionCase("padded_decoding", CAUSAL_70, sequences=padded(*MANY[4:5] * 3, rows=(1, 64))),
    AttentionCase("no_sample", CAUSAL_70, sequences=padded(rows=(5, 7)), small=True),
    # longer than the pattern, and what no tensor has room for
    AttentionCase(
        "beyond_the_pattern",
        Stored((50, 40), (16, 16), tiles=True),
        sequences=packed((45, 45), (20, 70), (70, 70), (5, 200)),
        small=True,
    ),
    AttentionCase(
        "packed_out_of_bounds",
        CAUSAL_70,
        sequences=Lying(
            ((0, 30, -9, 30), (30, -4, 30, 20), (34, 2**31 - 1, 31, 2**31 - 1), (99, 9, 999, 9)),
            (60, 64),
            True,
        ),
        small=True,
    ),
    AttentionCase(
        "padded_out_of_bounds",
        CAUSAL_70,
        sequences=Lying(
            ((None, 99, -3, 99), (None, -1, 5, 10), (None, 20, 70, 10), (None, 20, 30, -(2**31))),
            (45, 64),
            False,
        ),
        small=True,
    ),
    AttentionCase(
        "sequences_block5",
        Stored((41, 41), (5, 5), 2, tiles=True),
        heads_read="own",
        dropout=0.2,
        bias="own",
        sequences=packed((33, 41), (10, 12)),
    ),
    AttentionCase(
        "sequences_block24",
        Stored((100, 100), (24, 24), counts=True),
        sequences=padded((59, 90), (3, 100), (50, 50), rows=(60, 100)),
    ),
]


OPS: dict[str, list[Case]] = {
    "block_matmul": [c.case("block_matmul", build_block_matmul) for c in MATMUL_CASES],
    "sddmm": [c.case("sddmm", build_sddmm) for c in SDDMM_CASES],
    "block_softmax": [c.case("block_softmax", build_block_softmax) for c in SOFTMAX_CASES],
    "block_softmax_backward": [
        c.case("block_softmax_backward", build_block_softmax_backward) for c in SOFTMAX_CASES
    ],
    **{
        op: [c.case(op) for c in (*ATTENTION_CASES, *SEQUENCE_CASES)]
        for op in ("block_attention", "block_attention_backward")
    },
}
# in each some entries are zero by definition, and the operands are neither few nor tiny
EXAMPLES = {op: "transposed" if op.startswith("block_attention") else "partial" for op in OPS}
