"""`replace_bigbird_attention`: transformers' BigBird models on `sl.bigbird`.

Needs the extra `hf` (transformers 5). What stays as it was: parameters and their names, hooks,
training and evaluation patterns, padding masks, `gradient_checkpointing`, the switch to full
attention for short inputs, and `output_attentions=True`, for which the original computation runs.
What changes: no tensor of B * H * S * S entries is made, and numpy's global generator is not seeded
by every layer of every training step.

**Padding** is folded into the product of queries and keys. The original adds -10000 to the score
of a padded key; here the head size grows by eight coordinates, of which one is constant in every
query and holds that term in every padded key. That takes O(S) memory and no mask of its own for
every sample, and scores stay what they are: to a key without padding it adds exactly 0. Eight, so
that rows stay aligned. Where no key is padded the head size is left as it is; finding out costs one
read of the mask per forward pass (on a GPU a host sync), which is left out while a CUDA graph is
captured or `torch.compile` traces.

**Compiling**: masks are made outside of a graph, so a model that is compiled with `fullgraph=True`
or captured in a CUDA graph runs once before, at each length and in each mode.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_layouts.bigbird_tensor import BigBirdTensor, bigbird

try:
    from transformers.models.big_bird.modeling_big_bird import (
        BigBirdAttention,
        BigBirdBlockSparseAttention,
    )
except ImportError as error:
    raise ImportError(
        "sparse_layouts.integrations.transformers needs transformers 5 with BigBird: "
        "pip install 'sparse_layouts[hf]'"
    ) from error

LENGTHS_KEPT = 8  # lengths (on a device) whose masks are kept, of all layers
PENALTY = -10000.0  # what the original adds to the score of a padded key
EXTRA = 8  # coordinates that queries and keys grow by: 16 bytes in 16-bit types


class BigBirdMasks:
    """The masks of a model's layers, and whether the padding mask at hand pads anything.

    Keeps those of the `LENGTHS_KEPT` lengths used last. A copy of the model and a saved one begin
    empty.
    """

    def __init__(self) -> None:
        self.by_length: OrderedDict[Any, dict[Any, BigBirdTensor]] = OrderedDict()
        self.last: tuple[Any, int, bool] = (lambda: None, 0, False)

    def __reduce__(self) -> tuple[type[BigBirdMasks], tuple[()]]:
        return BigBirdMasks, ()

    def mask(self, seq_len: int, device: torch.device, **how: Any) -> BigBirdTensor:
        """`sl.bigbird(seq_len, device=device, **how)`, made once."""
        length, key = (seq_len, device), tuple(how.values())
        masks = self.by_length.get(length, {})
        if key not in masks:
            self._make(length, key, how)
        elif not torch.compiler.is_compiling():  # compiled code is guarded by the order of a dict
            self.by_length.move_to_end(length)
        return self.by_length[length][key]

    @torch.compiler.disable(
        reason="a mask is made outside of the graph: run the model once at this length, in this "
        "mode, before what is compiled with fullgraph=True"
    )
    def _make(self, length: tuple[int, torch.device], key: Any, how: dict[str, Any]) -> None:
        with torch.inference_mode(False):  # the next call may want gradients
            mask = bigbird(length[0], device=length[1], **how)
        self.by_length.setdefault(length, {})[key] = mask
        self.by_length.move_to_end(length)
        if len(self.by_length) > LENGTHS_KEPT:
            self.by_length.popitem(last=False)

    def pads(self, keys: Tensor) -> bool:
        """Whether the mask of keys is anything but ones; True where it must not be read."""
        if torch.compiler.is_compiling():
            return True
        if keys.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        # All layers of a forward pass get one tensor. Tensors of inference mode do not tell
        # whether they were written to.
        version = -1 if keys.is_inference() else keys._version
        found, seen, answer = self.last
        if version >= 0 and found() is keys and seen == version:
            return answer
        answer = not bool((keys == 1).all())
        self.last = (weakref.ref(keys), version, answer)
        return answer


class LayoutBlockSparseAttention(BigBirdBlockSparseAttention):
    """transformers' `BigBirdBlockSparseAttention`, computed by attention on a `BigBirdTensor`.

    Made by :func:`replace_bigbird_attention` alone, from an original, whose parameters it has.
    """

    masks: BigBirdMasks
    config: Any

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`(context, None)`: context (B, S, H * D) of hidden_states (B, S, hidden).

        `from_mask` (B, 1, S, 1) of queries and `to_blocked_mask` (B, S / block, block), else
        `to_mask` (B, 1, 1, S), of keys are 1 for a token and 0 for padding, None for no padding;
        the other masks say the same again. Rows that `from_mask` pads give 0.
        With `output_attentions` (argument or configuration) the original runs: `(context,
        probabilities (B, H, S, S))`. Raises `ValueError` for a length that the block does not
        divide, and what `sl.bigbird` raises.
        """
        wanted = kwargs.get("output_attentions")
        if wanted is None:
            wanted = getattr(self.config, "output_attentions", False)
        if wanted:
            return super().forward(
                hidden_states,
                band_mask,
                from_mask,
                to_mask,
                from_blocked_mask,
                to_blocked_mask,
                **kwargs,
            )
        batch, seq_len, _ = hidden_states.shape
        q, k, v = (
            project(hidden_states)
            .view(batch, seq_len, self.num_attention_heads, self.attention_head_size)
            .transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        # of the two masks of keys the blocked one is the same tensor for all layers
        padding = to_mask if to_blocked_mask is None else to_blocked_mask
        if padding is not None and self.masks.pads(padding):
            q, k = _with_penalty(q, k, padding.reshape(batch, 1, seq_len, 1))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._mask(seq_len, hidden_states.device),
            scale=1 / math.sqrt(self.attention_head_size),
        )
        if from_mask is not None:
            out = out * from_mask
        return out.transpose(1, 2).reshape(batch, seq_len, self.all_head_size), None

    def _mask(self, seq_len: int, device: torch.device) -> BigBirdTensor:
        """The pattern of this layer, in training or evaluation."""
        return self.masks.mask(
            seq_len,
            device,
            block_size=self.block_size,
            num_random_blocks=self.num_random_blocks,
            num_heads=self.num_attention_heads,
            seed=self.seed if self.training else 0,
            source="hf-train" if self.training else "hf-eval",
            max_seq_len=self.max_seqlen,
        )


def _with_penalty(q: Tensor, k: Tensor, to_mask: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (B, H, S, D + EXTRA), whose scaled product also has `(1 - to_mask) * PENALTY`.

    `to_mask` (B, 1, S, 1). The query's coordinate undoes the scale, so that the key's is the
    penalty itself: it then fits fp16.
    """
    size = q.shape[-1]
    constant = q.new_zeros(EXTRA)
    constant[0] = math.sqrt(size)
    penalty = F.pad((1 - to_mask.to(k.dtype)) * PENALTY, (0, EXTRA - 1))
    return (
        torch.cat([q, constant.expand(*q.shape[:-1], -1)], -1),
        torch.cat([k, penalty.expand(*k.shape[:-1], -1)], -1),
    )


class LayoutBigBirdAttention(BigBirdAttention):
    """transformers' `BigBirdAttention`, whose block-sparse kind is always the replaced one.

    A model that switches to full attention, which a short input makes it do, and back by
    `set_attention_type("block_sparse")` comes back to layouts.
    """

    masks: BigBirdMasks

    def set_attention_type(self, value: str, layer_idx: int | None = None) -> None:
        """As the original."""
        super().set_attention_type(value, layer_idx)
        _use_layouts(self, self.masks)


def _use_layouts(attention: BigBirdAttention, masks: BigBirdMasks) -> bool:
    """Makes a block-sparse attention one on layouts, in place; whether it was another."""
    # The modules stay the objects that they are and only change their class: parameters, hooks,
    # their places in other containers all hold.
    own = attention.self
    if type(own) is not BigBirdBlockSparseAttention:
        return False
    own.__class__ = LayoutBlockSparseAttention
    own.masks, own.config = masks, attention.config
    if type(attention) is BigBirdAttention:
        attention.__class__ = LayoutBigBirdAttention
    attention.masks = masks
    return True


def replace_bigbird_attention(model: nn.Module) -> int:
    """Makes a BigBird model attend by `sl.bigbird` masks, in place; returns how many layers it
    changed.

    `model` is any module with transformers' BigBird attention inside (`BigBirdModel`,
    `BigBirdForMaskedLM`, a layer, ...). In training the random blocks of a layer are those that the
    original draws, in evaluation those of "hf-eval"; outputs and gradients are the original's, up
    to rounding. Masks are made once per length and device. Parameters and the names in
    `state_dict()` do not change; the original has no dropout here, so neither has this.

    Layers that are replaced already are left alone, and so are subclasses of the original and those
    of full attention (decoders, cross-attention); if they are all that there is, 0 or an error.

    Raises `TypeError` for what is no module and `ValueError` for a model without BigBird attention
    (BigBirdPegasus has another), with none that is block-sparse
    (`model.set_attention_type("block_sparse")` makes it so), or with one that has no seed.

    >>> from transformers import BigBirdConfig, BigBirdModel
    >>> from sparse_layouts.integrations.transformers import replace_bigbird_attention
    >>> config = BigBirdConfig(
    ...     hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32
    ... )
    >>> replace_bigbird_attention(BigBirdModel(config))
    2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_bigbird_attention: expected a model, got {type(model).__name__}")
    found = [m for m in model.modules() if isinstance(m, BigBirdAttention)]
    if not found:
        raise ValueError(
            f"replace_bigbird_attention: {type(model).__name__} has no BigBird attention; "
            f"expected a model such as transformers.BigBirdModel"
        )
    if not any(isinstance(m.self, BigBirdBlockSparseAttention) for m in found):
        raise ValueError(
            f"replace_bigbird_attention: all {len(found)} BigBird attentions of "
            f"{type(model).__name__} are full (attention_type='original_full', or switched to it "
            f"by a short input); model.set_attention_type('block_sparse') makes an encoder's sparse"
        )
    if any(m.self.seed is None for m in found if type(m.self) is BigBirdBlockSparseAttention):
        raise ValueError(
            "replace_bigbird_attention: an attention has no seed to draw its blocks with; give it "
            "its layer's index, as BigBirdModel does: BigBirdAttention(config, seed=0)"
        )
    masks = next((m.masks for m in found if isinstance(m, LayoutBigBirdAttention)), None)
    masks = BigBirdMasks() if masks is None else masks
    return sum([_use_layouts(m, masks) for m in found])
