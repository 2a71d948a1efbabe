"""What torch's own functions do to a layout: pointwise work and bookkeeping on its stored entries.

Two levels. Above autograd, :func:`keeps_layout` says which functions may go down as they are,
because an entry that is not stored, being zero, stays zero, or because they are in-place and cannot
change what is stored. Below autograd, `ATEN` does them on the values; there any pointwise operator
may come (autograd's formulas use them), and entries that are not stored do not matter to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_layouts.dispatch import Layout
from sparse_layouts.optimizer_entries import called_by_optimizer, dense_operand

if TYPE_CHECKING:
    from sparse_layouts.layout_tensor import LayoutTensor

aten = torch.ops.aten

_ZERO_STAYS_ZERO = (
    "neg negative abs absolute sign sgn sin tan sinh tanh asin arcsin atan arctan asinh arcsinh "
    "atanh arctanh sqrt expm1 log1p erf floor ceil round trunc fix frac square positive relu "
    "deg2rad rad2deg nan_to_num"
).split()
_IN_PLACE = (
    "add_ sub_ mul_ div_ neg_ abs_ sqrt_ rsqrt_ reciprocal_ square_ sign_ exp_ log_ pow_ clamp_ "
    "clamp_min_ clamp_max_ relu_ tanh_ sigmoid_ addcmul_ addcdiv_ lerp_ masked_fill_ zero_ fill_ "
    "copy_ nan_to_num_ __iadd__ __isub__ __imul__ __itruediv__ normal_ uniform_ bernoulli_ "
    "dropout_"
).split()
_BOOKKEEPING = (
    "detach detach_ clone requires_grad_ retain_grad backward register_hook "
    "register_post_accumulate_grad_hook size dim ndimension numel nelement stride element_size "
    "is_contiguous contiguous is_floating_point is_complex is_same_size to cpu cuda float double "
    "half bfloat16 int long short char byte bool type_as "
    "pin_memory is_pinned get_device "
    "has_names __len__ __hash__ _has_compatible_shallow_copy_type storage_offset __bool__ "
    "is_inference is_conj is_neg is_nonzero is_signed _is_view _typed_storage "
    "untyped_storage data_ptr"
).split()


def _collect() -> frozenset[Any]:
    kept: set[Any] = set()
    for name in (*_ZERO_STAYS_ZERO, *_IN_PLACE, *_BOOKKEEPING):
        for owner in (torch, torch.Tensor, torch.nn.functional, torch.special):
            found = getattr(owner, name, None)
            if found is not None:
                kept.add(found)
    for name in ("zeros_like", "empty_like", "numel", "is_same_size", "is_floating_point"):
        kept.add(getattr(torch, name))
    for name in dir(torch):
        if name.startswith("_foreach_") or name.startswith("_fused_"):
            kept.add(getattr(torch, name))
    kept.add(torch._amp_foreach_non_finite_check_and_unscale_)
    for name in ("sym_size", "sym_stride", "sym_storage_offset", "sym_numel"):
        packet = getattr(aten, name)  # torch.compile asks by these for sizes that vary
        kept.update(getattr(packet, overload) for overload in packet.overloads())
    # Both look at their arguments' __torch_function__; densified inputs would silently get no
    # gradient.
    kept.update((torch.autograd.grad, torch.autograd.backward))
    kept.discard(torch.Tensor.__bool__)
    kept.discard(torch.Tensor.is_nonzero)
    return frozenset(kept)


_KEPT = _collect()
# Property reads and writes (w.shape, w.grad = g) are bookkeeping too, but for those that make
# another tensor.
_MAKES_TENSOR = frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")
)


def keeps_layout(function: Callable[..., Any]) -> bool:
    """Whether torch's own function may be applied to a layout as it is, to act on its stored
    entries.
    """
    if function in _KEPT:
        return True
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return function not in _MAKES_TENSOR
    if name == "custom_function_call":  # how torch.func runs an autograd.Function, ours among them
        return True
    if getattr(function, "namespace", "") == "sparse_layouts":  # an operator that takes it whole
        return True
    return name.endswith("_") and _initialises(function)


def _collect_writes() -> frozenset[Any]:
    names = {found for name in _IN_PLACE if (found := getattr(torch.Tensor, name, None))}
    names |= {found for name in _IN_PLACE if (found := getattr(torch, name, None))}
    lists = [n for n in dir(torch) if n.startswith(_LISTS_IN_TORCH) and n.endswith("_")]
    return frozenset(names | {getattr(torch, name) for name in lists})


_LISTS_IN_TORCH = ("_foreach_", "_fused_", "_amp_foreach_")
_WRITES = _collect_writes()


def _initialises(function: Callable[..., Any]) -> bool:
    """Whether this is one of torch.nn.init's functions, which fill their argument in place."""
    return getattr(function, "__module__", None) == "torch.nn.init"


def writes_entries(function: Callable[..., Any]) -> bool:
    """Whether a function that :func:`keeps_layout` names is an in-place one."""
    return function in _WRITES or _initialises(function)


ATEN: dict[Any, Callable[..., Any]] = {}


def handles(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what one or several aten operators do to layouts."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            ATEN[operator] = handler
        return handler

    return register


def _first(args: Any) -> LayoutTensor:
    for value in args:
        if isinstance(value, Layout):
            return value  # type: ignore[return-value]
        if isinstance(value, (tuple, list)):
            for v in value:
                if isinstance(v, Layout):
                    return v  # type: ignore[return-value]
    raise AssertionError("no layout among the arguments")


def short(value: Any) -> str:
    """A layout as it prints, a plain tensor by its type and shape: for messages."""
    if isinstance(value, Tensor) and not isinstance(value, Layout):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return value.one_line() if isinstance(value, Layout) else repr(value)


_TAKE_MASKS = (aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)


def _values_of(value: Any, like: LayoutTensor, what: Any) -> Any:
    """An operand of a pointwise operator in terms of `like`'s stored values; raises for what has
    entries elsewhere.
    """
    if isinstance(value, Layout):
        other: Any = value
        if other is not like and not other.same_pattern(like):
            raise TypeError(
                f"{what}: the operands store different entries ({short(other)} and "
                f"{short(like)}). Sample one onto the other: "
                "x.to_dense().sparse_mask(w)."
            )
        if other.stored_values is None and what not in _TAKE_MASKS:
            raise TypeError(
                f"{what}: the mask {short(other)} has no values to compute with; take "
                f"mask.to({like.dtype}) first"
            )
        return other.in_order_of(like).stored_values
    if isinstance(value, Tensor) and value.dim() > 0:
        if called_by_optimizer():
            return dense_operand(value, like, what)
        raise TypeError(
            f"{what}: a dense operand of shape {tuple(value.shape)} has entries that the "
            f"{type(like).__name__} does not store. "
            "Sample it first: x.sparse_mask(w)."
        )
    return value


def count_write(layout: Any) -> None:
    """Tells autograd that a layout's values were written to below it.

    A transpose or a slice on the same memory, or an operation on `w.values()`, may have saved them:
    its backward pass then raises, as torch's does, instead of computing with what is there now.
    """
    values = layout.stored_values
    if type(values) is Tensor and not values.is_inference():  # no other: it is being traced
        torch.autograd.graph.increment_version(values)


def pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """A pointwise operator, in place or not, on the stored entries."""
    if "out" in kwargs:
        return pointwise_into(func, args, kwargs)
    writes = func._schema.is_mutable
    target = args[0] if writes and isinstance(args[0], Layout) else None
    like: Any = target if target is not None else _first((*args, *kwargs.values()))
    if like.stored_values is None:
        raise TypeError(
            f"{func}: a mask layout has no values; take {type(like).__name__}.to(dtype) first"
        )
    unwrapped = [_values_of(a, like, func) for a in args]
    named = {k: _values_of(v, like, func) for k, v in kwargs.items()}
    out = func(*unwrapped, **named)
    if target is not None:
        like.clear_unstored()
        count_write(like)
        return target
    result = like.like_self(out)
    result.clear_unstored()
    return result


def pointwise_into(func: Any, args: Any, kwargs: Any) -> Any:
    """A pointwise operator with `out=`: a layout gets the stored entries, a dense tensor all."""
    out = kwargs["out"]
    if not isinstance(out, Layout):
        whole = [a.to_dense_entries() if isinstance(a, Layout) else a for a in args]  # type: ignore[attr-defined]
        return func(*whole, **kwargs)
    like: Any = out
    unwrapped = [_values_of(a, like, func) for a in args]
    func(*unwrapped, **{k: _values_of(v, like, func) for k, v in kwargs.items()})
    like.clear_unstored()
    count_write(like)
    return out


handles(aten.abs_.default)(pointwise)  # the one in-place form that torch does not tag so


@handles(
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
    aten.normal_.default,
    aten.uniform_.default,
    aten.bernoulli_.float,
)
def fill(func: Any, args: Any, kwargs: Any) -> Any:
    """Filling acts on the stored entries."""
    if args[0].stored_values is None:
        raise TypeError(f"{func}: a mask layout has no values")
    func(args[0].stored_values, *args[1:], **kwargs)
    args[0].clear_unstored()
    count_write(args[0])
    return args[0]


@handles(aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
def masked_fill_(func: Any, args: Any, kwargs: Any) -> Any:
    """`w.masked_fill_(mask, value)` on the stored entries; the mask is a layout of the same pattern
    or dense.
    """
    target, mask, value = args
    if isinstance(mask, Layout):
        chosen = _values_of(mask, target, func)
        if chosen is None:  # the mask of exactly the stored entries
            chosen = torch.ones_like(target.stored_values, dtype=torch.bool)
    else:
        chosen = target.sample(
            mask.expand(target.shape).to(target.stored_values.dtype)
        ).stored_values.bool()
    func(target.stored_values, chosen, value)
    target.clear_unstored()
    count_write(target)
    return target


@handles(aten.linalg_vector_norm.default)
def vector_norm(func: Any, args: Any, kwargs: Any) -> Tensor:
    """A norm over everything: zeros add nothing to it for orders above 0."""
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if dim is not None or order <= 0:
        raise NotImplementedError(
            f"vector_norm of a layout: over all entries, with an order above 0; got {order}, {dim}"
        )
    dtype = kwargs.get("dtype")
    return func(args[0].stored_values.flatten(), order, dtype=dtype)


def over_lists(func: Any, args: Any, kwargs: Any) -> Any:
    """The foreach and fused forms: every layout of a list is replaced by its values, pattern by
    pattern.
    """
    lead: Any = next(a for a in args if isinstance(a, (list, tuple)) and layouts_of(a))
    like = list(lead)
    fused = func._schema.name.startswith("aten::_fused_")
    reordered: list[tuple[Tensor, Tensor]] = []
    elsewhere: list[tuple[Any, Any, Tensor]] = []  # written to in the place of what was given

    def entries(value: Any, layout: Any, is_written: bool) -> Any:
        values, first = _values_of(value, layout, func), layout.stored_values
        own = value.stored_values if isinstance(value, Layout) else value  # type: ignore[attr-defined]
        if is_written and values is not own:
            elsewhere.append((value, layout, values))
        if not fused or values.dim() == 0 or values.stride() == first.stride():
            return values
        # fused kernels walk through memory, whatever the strides
        made = first.new_empty_strided(first.shape, first.stride(), dtype=values.dtype)
        reordered.append((values, made.copy_(values)))
        return made

    def unwrap(value: Any, name: str) -> Any:
        if isinstance(value, (list, tuple)):
            return [
                entries(v, like[i], name in written)
                if i < len(like) and isinstance(like[i], Layout)
                else (v.to_dense_entries() if isinstance(v, Layout) else v)  # type: ignore[attr-defined]
                for i, v in enumerate(value)
            ]
        return value

    declared = func._schema.arguments
    written = {a.name for a in declared if a.alias_info is not None and a.alias_info.is_write}
    by_place = [unwrap(v, a.name) for v, a in zip(args, declared, strict=False)]
    out = func(*by_place, **{k: unwrap(v, k) for k, v in kwargs.items()})
    for values, made in reordered:
        values.copy_(made)
    for value, layout, values in elsewhere:
        _write_back(value, layout.like_self(values))
    if func._schema.is_mutable:
        for layout in like:
            if isinstance(layout, Layout):
                layout.clear_unstored()  # type: ignore[attr-defined]
        _count_writes(func, args, kwargs)
        return out if out is None else lead
    if not isinstance(out, (list, tuple)) or "norm" in func.__name__:
        return out
    return [
        layout.like_self(values) if isinstance(layout, Layout) else values  # type: ignore[attr-defined]
        for layout, values in zip(like, out, strict=True)
    ]


def _write_back(value: Any, result: Any) -> None:
    """Writes what was computed in the place of an operand, a layout of another order or a dense
    tensor, to it.
    """
    if isinstance(value, Layout):
        value.stored_values.copy_(result.in_order_of(value).stored_values)  # type: ignore[attr-defined]
    else:
        stored = result.pattern.to_dense_entries()
        value.copy_(torch.where(stored, result.to_dense_entries(), value))


def _count_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Tells autograd of the layouts that were written to, so that a backward pass that needs what
    was there raises.
    """
    if torch.compiler.is_compiling():
        return
    for i, declared in enumerate(func._schema.arguments):
        if declared.alias_info is None or not declared.alias_info.is_write:
            continue
        written = args[i] if i < len(args) else kwargs.get(declared.name)
        for layout in written if isinstance(written, (list, tuple)) else [written]:
            if isinstance(layout, Layout) and not layout.is_inference():  # type: ignore[attr-defined]
                torch.autograd.graph.increment_version(layout)  # type: ignore[arg-type]
                count_write(layout)


def layouts_of(values: Any) -> bool:
    """Whether a list holds a layout."""
    return any(isinstance(v, Layout) for v in values)


_LISTS = ("aten::_foreach_", "aten::_fused_", "aten::_amp_foreach_")


def handler_of(operator: Any) -> Callable[..., Any] | None:
    """What does `operator` on layouts, None if nothing does."""
    handler = ATEN.get(operator)
    if handler is not None:
        return handler
    if torch.Tag.pointwise in operator.tags:
        return pointwise
    if operator._schema.name.startswith(_LISTS):
        return over_lists
    return None
