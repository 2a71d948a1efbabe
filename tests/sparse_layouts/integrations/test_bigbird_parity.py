"""BigBird models of transformers on layouts: the same random blocks, outputs and gradients.

Errors are measured against the original in float64; the replaced model may err as much as the
original does in the same dtype, twice over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from tests.sparse_layouts.integrations.bigbird_models import (
    check,
    config,
    modeling,
    padding,
    pair,
    relative,
    run,
    small_config,
    transformers,
)


class Gathered(Exception):
    """The original's random blocks (heads, nb - 2, r): thrown when it gathers them."""


def gathered(attention: Any, n: int, block: int) -> Tensor:
    """The random blocks of the original's forward pass."""

    def throw(x: Tensor, index: Tensor) -> Tensor:
        raise Gathered(index[0])

    attention.torch_gather_b2 = throw
    blocked, band, rows, keys = modeling.BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, n), block
    )
    with pytest.raises(Gathered) as thrown:
        attention(torch.zeros(1, n, 32), band, rows, keys, blocked, blocked)
    return thrown.value.args[0]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("n", "block", "r", "longest"),
    [
        *((n, 64, 3, 4096) for n in (768, 1024, 1536, 2048, 3072, 4096)),
        *((n, 32, 2, 8192) for n in (1024, 2048, 4096)),
        (3072, 192, 2, 4096),  # a row with a single block to draw from
        (400, 16, 10, 4096),  # a plan of two segments with blocks to draw
        (128, 16, 3, 4096),  # of one segment
    ],
)
def test_draws(n: int, block: int, r: int, longest: int, train: bool) -> None:
    """Which blocks the original gathers, and how often, against the mask's lists."""
    own = config(block_size=block, num_random_blocks=r, max_position_embeddings=longest)
    nb = n // block
    for seed in (0, 7):
        attention = modeling.BigBirdBlockSparseAttention(own, seed).train(train)
        drawn = gathered(attention, n, block)
        mask = sl.bigbird(
            n,
            block_size=block,
            num_random_blocks=r,
            num_heads=2,
            seed=seed,
            source="hf-train" if train else "hf-eval",
            max_seq_len=longest,
        )
        for h in range(2):
            p = mask[h].block_pattern
            found = torch.zeros(nb, nb, dtype=torch.long)
            row = torch.arange(nb).repeat_interleave(p.crow_indices[0].diff())
            found[row, p.col_indices.long()] = (
                1 if p.block_counts is None else p.block_counts.long()
            )
            for i in range(1, nb - 1):
                for j in {0, i - 1, i, i + 1, nb - 1}:
                    found[i, j] -= 1
            expected = torch.zeros(nb - 2, nb, dtype=torch.long)
            expected.scatter_add_(1, drawn[h], torch.ones_like(drawn[h]))
            assert torch.equal(found[1:-1], expected)
            assert (found[[0, -1]] == 1).all()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [768, 1024, 2048, 3072, 4096])
def test_parity(n: int, train: bool) -> None:
    some = 2 if n < 3000 else 1  # layers, and samples, of which the last one is padded
    original, replaced = pair(train, config(num_hidden_layers=some))
    mask = padding(n, "right")
    assert mask is not None
    check(original, replaced, torch.randn(some, n, 32), mask[-some:])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["none", "ones", "right", "left", "scattered", "everything"])
def test_parity_with_padding(kind: str, train: bool) -> None:
    original, replaced = pair(train, small_config())
    check(original, replaced, torch.randn(3, 64, 32), padding(64, kind, 3))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [62, 64])
def test_float64_is_equal(n: int, train: bool, assert_close: Callable[..., None]) -> None:
    """62 tokens: the model pads to blocks by itself."""
    original, replaced = (m.double() for m in pair(train, small_config()))
    embeddings, mask = torch.randn(2, n, 32, dtype=torch.float64), padding(n, "right")
    wanted, found = run(original, embeddings, mask), run(replaced, embeddings, mask)
    scale = max(float(g.norm()) for g in wanted.values())  # some gradients cancel to nothing
    for name, w in wanted.items():
        assert_close(found[name], w, scale=None if name == "out" else scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half(dtype: torch.dtype) -> None:
    original, replaced = (m.to(dtype) for m in pair(True, small_config()))
    check(original, replaced, torch.randn(2, 64, 32).to(dtype), padding(64, "right"))


def test_autocast() -> None:
    """The original itself cannot: so no worse than it is with everything in bfloat16."""
    original, replaced = pair(False, small_config())
    embeddings, mask = torch.randn(2, 64, 32), padding(64, "right")

    def output(model: Any, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            x = embeddings.to(dtype)
            return model(inputs_embeds=x, attention_mask=mask).last_hidden_state

    exact = output(copy.deepcopy(original).double(), torch.float64)
    half = output(original.to(torch.bfloat16), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), sl.fallback("error"):
        found = output(replaced, torch.float32)
    assert relative(found, exact) <= relative(half, exact)


@pytest.mark.parametrize("inference", [True, False])
def test_without_gradients(inference: bool, assert_close: Callable[..., None]) -> None:
    original, replaced = (m.double() for m in pair(False, small_config()))
    ids, mask = torch.randint(3, 100, (2, 64)), padding(64, "left")
    with torch.inference_mode(inference), torch.no_grad():
        wanted, found = (m(ids, mask).last_hidden_state for m in (original, replaced))
        assert_close(found, wanted)
    # what was made there serves where gradients are wanted
    replaced(ids, mask).last_hidden_state.sum().backward()
    assert replaced.encoder.layer[0].attention.self.key.weight.grad is not None


def test_parity_of_attention_alone(assert_close: Callable[..., None]) -> None:
    """Called by itself, with the masks that the model makes; padded rows give 0."""
    original, replaced = (m.double() for m in pair(True, small_config()))
    mask = padding(64, "scattered")
    assert mask is not None
    blocked, band, rows, keys = original.create_masks_for_block_sparse_attn(mask.double(), 4)
    x = torch.randn(2, 64, 32, dtype=torch.float64)
    wanted, _ = original.encoder.layer[1].attention.self(x, band, rows, keys, blocked, blocked)
    attention = replaced.encoder.layer[1].attention.self
    found, probabilities = attention(x, band, rows, keys, blocked, blocked)
    assert probabilities is None
    assert_close(found, wanted)
    assert not found[mask == 0].any()
    assert_close(attention(x, from_mask=rows, to_mask=keys)[0], wanted)
    ones = torch.ones_like(mask.double())
    blocked, band, rows, keys = original.create_masks_for_block_sparse_attn(ones, 4)
    wanted, _ = original.encoder.layer[1].attention.self(x, band, rows, keys, blocked, blocked)
    assert_close(attention(x)[0], wanted)


def test_training_step_by_step(assert_close: Callable[..., None]) -> None:
    """AdamW on a masked language model, with checkpointing on one side."""
    make = transformers.BigBirdForMaskedLM
    original, replaced = (m.double() for m in pair(True, small_config(), make))
    replaced.activation_checkpointing_enable()
    ids = torch.randint(3, 100, (2, 60))
    losses = []
    for model in (original, replaced):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        own = []
        for _ in range(4):
            loss = model(input_ids=ids, attention_mask=padding(60, "right"), labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(loss.detach())
        losses.append(torch.stack(own))
    assert losses[0][-1] < losses[0][0]
    assert_close(losses[1], losses[0], scale=1e4)  # steps of Adam amplify what rounding differs
