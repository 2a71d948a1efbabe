"""A layout as the mask of `nn.MultiheadAttention` and `nn.TransformerEncoder`.

There a bool mask says which entries are *not* attended to, the opposite of
`F.scaled_dot_product_attention`, and the modules turn it into an additive one, -inf where it is
True, before anything else (`F._canonical_mask`). As a dense tensor that is the (N, N) matrix that
the layout was to avoid. Here it stays a layout, :class:`AdditiveMask`, through the reshapes that
the modules do, and arrives at attention as the mask of what is attended to: the sparse kernel.

What needs the dense scores (`need_weights=True`, a key padding mask beside it) takes the dense
fallback. So does compiled code, where a caller cannot be looked at, and so does the comparison by
which `nn.TransformerEncoder` finds out whether a mask is causal; `is_causal=False` leaves that out.
"""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.derived import derived
from sparse_layouts.dispatch import Layout, call_route, fall_back, route
from sparse_layouts.layout_routes import if_taken
from sparse_layouts.mask_algebra import complement_mask

_FACTS = frozenset(
    {
        torch.Tensor.dim,
        torch.Tensor.size,
        torch.Tensor.numel,
        torch.Tensor.is_floating_point,
        torch.is_floating_point,
        torch.Tensor.__len__,
        torch.Tensor.__hash__,
    }
)


class AdditiveMask(torch.Tensor, Layout):
    """-inf where a mask layout is True and 0 elsewhere: what attention modules add to the scores.

    `barred` is the mask, (N, N), or (B * H, N, N) with a pattern for each sample and head; leading
    dimensions of size 1, or expanded, may have been put before it. Its memory is the mask's.
    """

    barred: BSRTensor

    @staticmethod
    def __new__(cls, barred: BSRTensor, shape: tuple[int, ...], dtype: torch.dtype) -> AdditiveMask:
        """The additive form of `barred`, of this shape and dtype."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=barred.device)
        self.barred = barred
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch.Tensor's own __init__ takes no arguments
        super().__init__()

    def to_dense(self, *args: Any, **options: Any) -> Tensor:
        """The matrix that dense code would have made."""
        barred = self.barred.to_dense_entries()
        scores = torch.zeros(barred.shape, dtype=self.dtype, device=barred.device)
        return self._in_shape(scores.masked_fill_(barred, -math.inf))

    def _in_shape(self, matrix: Tensor) -> Tensor:
        if matrix.dim() == 3 and self.dim() == 4:
            return matrix.reshape(self.shape)
        return matrix.expand(self.shape)

    def reshaped(self, shape: tuple[int, ...]) -> AdditiveMask:
        """The same entries with other leading dimensions."""
        return AdditiveMask(self.barred, shape, self.dtype)

    def allowed(self) -> BSRTensor | None:
        """The mask of what is attended to, as SDPA takes it; None where it has no such form.

        Made once for a pattern and kept with it.
        """
        barred, pattern = self.barred, self.barred.block_pattern
        if pattern.block_counts is not None:
            return None
        mask = derived(pattern, "complement", lambda: complement_mask(barred))
        if barred.dim() == 2:
            return mask
        if barred.dim() != 3 or self.dim() != 4:
            return None
        lead = (self.shape[0], self.shape[1])
        return BSRTensor.on_pattern(None, mask.block_pattern._replace(lead=lead))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func in _FACTS or getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = call_route(func, args, kwargs)
        return fall_back(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise NotImplementedError(
            f"{func} reached the additive form of a mask layout below autograd; pass "
            "mask.to_dense() to this module."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        barred = self.barred.one_line()
        return f"AdditiveMask({list(self.shape)}, {self.dtype}, -inf where {barred} is True)"


def made_by_attention_module() -> bool:
    """Whether torch.nn's own code turns a bool mask into an additive one."""
    if torch.compiler.is_compiling():
        return False
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("sparse_layouts."):
        frame = frame.f_back
    return frame is not None and frame.f_code is F._canonical_mask.__code__


def becomes_additive(input: BSRTensor, **options: Any) -> bool:
    """Whether `zeros_like` of a mask is an attention module's first step to an additive one."""
    return set(options) == {"dtype"} and input.is_mask and made_by_attention_module()


@route(torch.zeros_like, input=BSRTensor, uses=if_taken(becomes_additive))
def additive_mask(input: BSRTensor, **options: Any) -> Any:
    """`F._canonical_mask`'s `zeros_like(mask, dtype=...)`: the additive form; for other code dense.

    Its second step, `masked_fill_(mask, -inf)`, finds done what it asks for.
    """
    if not becomes_additive(input, **options):
        return NotImplemented
    return AdditiveMask(input, tuple(input.shape), options["dtype"])


def is_barred_entries(input: AdditiveMask, mask: BSRTensor, value: Any) -> bool:
    """Whether `masked_fill_` fills the barred entries with -inf."""
    return mask is input.barred and value == -math.inf


@route(
    torch.Tensor.masked_fill_,
    input=AdditiveMask,
    mask=BSRTensor,
    uses=if_taken(is_barred_entries),
)
def fill_barred(input: AdditiveMask, mask: BSRTensor, value: Any) -> Any:
    """The second step of `F._canonical_mask`."""
    return input if is_barred_entries(input, mask, value) else NotImplemented


@route(torch.Tensor.unsqueeze, input=AdditiveMask)
def unsqueeze_mask(input: AdditiveMask, dim: int) -> Any:
    """A leading dimension of one."""
    if dim != 0 or input.barred.dim() != 2:
        return NotImplemented
    return input.reshaped((1, *input.shape))


@route(torch.Tensor.view, input=AdditiveMask)
def view_mask(input: AdditiveMask, *shape: Any) -> Any:
    """`mask.view(1, 1, N, N)`; `mask.view(B, H, -1, N)` of a mask (B * H, N, N)."""
    m, n = input.shape[-2:]
    if len(shape) != 4 or shape[2] not in (m, -1) or shape[3] != n:
        return NotImplemented
    lead = tuple(shape[:2])
    if input.barred.dim() == 2:
        return input.reshaped((*lead, m, n)) if lead == (1, 1) else NotImplemented
    count = input.shape[0]
    if lead[1] == -1 and lead[0] and count % lead[0] == 0:
        lead = (lead[0], count // lead[0])
    if -1 in lead or math.prod(lead) != count or input.dim() != 3:
        return NotImplemented
    return input.reshaped((*lead, m, n))


@route(torch.Tensor.expand, input=AdditiveMask)
def expand_mask(input: AdditiveMask, *shape: int) -> Any:
    """`mask.expand(B, H, -1, -1)` of a mask (1, 1, N, N)."""
    if input.barred.dim() != 2 or len(shape) != input.dim() or shape[-2:] != (-1, -1):
        return NotImplemented
    return input.reshaped((*shape[:-2], *input.shape[-2:]))


@route(F.scaled_dot_product_attention, attn_mask=AdditiveMask)
def attend_where_allowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: AdditiveMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """SDPA under an additive form: the mask of what is attended to, by block-sparse kernels."""
    allowed = attn_mask.allowed()
    if allowed is None or is_causal:
        return NotImplemented
    return F.scaled_dot_product_attention(query, key, value, allowed, dropout_p, **options)


def _self_attention(
    x: Tensor,
    num_heads: int,
    qkv: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    mask: AdditiveMask,
) -> Tensor:
    """Attention of x (B, N, E) to itself, with a module's packed projections."""
    split = F.linear(x, *qkv).unflatten(-1, (3, num_heads, -1))  # (B, N, 3, H, D)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
    heads = F.scaled_dot_product_attention(q, k, v, mask)
    return F.linear(heads.transpose(1, 2).flatten(2), *out)


@route(torch._native_multi_head_attention, mask=AdditiveMask)
def native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: AdditiveMask,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """`nn.MultiheadAttention`'s path for evaluation."""
    if need_weights or mask.allowed() is None or not (query is key is value):
        return NotImplemented
    qkv, out = (qkv_weight, qkv_bias), (proj_weight, proj_bias)
    return _self_attention(query, num_head, qkv, out, mask), None


@route(torch._transformer_encoder_layer_fwd, mask=AdditiveMask)
def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: AdditiveMask,
    mask_type: int | None = None,
) -> Any:
    """`nn.TransformerEncoderLayer`'s path for evaluation."""
    if mask.allowed() is None:
        return NotImplemented
    qkv, out = (qkv_weight, qkv_bias), (proj_weight, proj_bias)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = norm(src, norm_weight_1, norm_bias_1)
        src = src + _self_attention(x, num_heads, qkv, out, mask)
        return src + feed_forward(norm(src, norm_weight_2, norm_bias_2))
    x = src + _self_attention(src, num_heads, qkv, out, mask)
    x = norm(x, norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)
