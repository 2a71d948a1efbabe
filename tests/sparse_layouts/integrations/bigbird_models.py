"""Tiny random BigBird models of transformers, and what compares one with its copy on layouts.

Importing this skips a test file where transformers is not installed.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl

transformers = pytest.importorskip("transformers", reason="needs the extra hf: transformers")
modeling = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
integration = pytest.importorskip("sparse_layouts.integrations.transformers")

EPS_MORE = 4


def config(**more: Any) -> Any:
    own = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "vocab_size": 100,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,  # scores of several units: what is attended to matters
    }
    return transformers.BigBirdConfig(**own | more)


def small_config(**more: Any) -> Any:
    """Blocks of 4: more than 36 tokens are block-sparse."""
    return config(block_size=4, num_random_blocks=2, max_position_embeddings=128, **more)


def pair(train: bool, own: Any, make: Any = None) -> tuple[Any, Any]:
    """A model and a copy on layouts."""
    original = (make or transformers.BigBirdModel)(own).train(train)
    replaced = copy.deepcopy(original)
    assert integration.replace_bigbird_attention(replaced) == own.num_hidden_layers
    return original, replaced


def padding(n: int, kind: str, samples: int = 2) -> Tensor | None:
    """(samples, n) of int64, 1 for a token; the first sample is whole."""
    if kind == "none":
        return None
    mask = torch.ones(samples, n, dtype=torch.long)
    last = slice(1, None)
    if kind == "right":
        mask[last, n * 3 // 5 :] = 0
    elif kind == "left":
        mask[last, : n // 3] = 0
    elif kind == "scattered":
        mask[last] = (torch.rand(samples - 1, n) < 0.5).long()
    elif kind == "everything":
        mask[last] = 0
    return mask


def run(model: Any, embeddings: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Output, the gradient of the input and those of all parameters, of a weighted sum."""
    model.zero_grad()
    x = embeddings.to(next(model.parameters()).dtype).requires_grad_()
    out = model(inputs_embeds=x, attention_mask=mask).last_hidden_state
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    assert x.grad is not None
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "input": x.grad, **own}


def relative(found: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    return float((found.double() - exact).norm() / (exact if scale is None else scale).norm())


def check(original: Any, replaced: Any, embeddings: Tensor, mask: Tensor | None) -> None:
    """The replaced model errs at most twice as much as the original, and a few eps."""
    exact = run(copy.deepcopy(original).double(), embeddings, mask)
    dense = run(original, embeddings, mask)
    with sl.fallback("error"):
        found = run(replaced, embeddings, mask)
    assert list(found) == list(dense) == list(exact)
    for name, f in found.items():
        assert f.dtype == dense[name].dtype
        assert not f.isnan().any()
        # A bias of keys changes no probability. Its gradient is 0: what is left is rounding, of as
        # many terms of both signs as the gradient of the weight has.
        scale = exact[name.replace("key.bias", "key.weight")]
        if not float(scale.norm()):
            continue
        limit = 2 * relative(dense[name], exact[name], scale) + EPS_MORE * torch.finfo(f.dtype).eps
        assert relative(f, exact[name], scale) <= limit, name
