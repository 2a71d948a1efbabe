"""LayoutTensor: what every layout is, once. A layout's file declares its fields and what is its
own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sparse_layouts import stored_copies  # noqa: F401  registers what is done below autograd
from sparse_layouts.dispatch import Layout, call_route, fall_back
from sparse_layouts.dispatch.fallback import densified, first_argument, layouts_in
from sparse_layouts.dispatch.routes import ROUTES
from sparse_layouts.dispatch.text import folded, terminal_width
from sparse_layouts.exported_layouts import opened
from sparse_layouts.index_identity import same_indices
from sparse_layouts.matrix_sources import each_matrix, scipy_data
from sparse_layouts.operators import Operators
from sparse_layouts.optimizer_entries import called_by_optimizer, on_entries
from sparse_layouts.stored_entries import handler_of, keeps_layout, short, writes_entries

L = TypeVar("L", bound="LayoutTensor")


class LayoutTensor(Operators, torch.Tensor, Layout):
    """A matrix that stores part of its entries, as a `torch.Tensor`; what is not stored is zero
    (False in a mask).

    A subclass names its tensors in `fields` (each is kept as attribute `inner_<name>`; the first
    one holds the values, its dtype is the layout's) and its other metadata, hashable and static, in
    `static_fields`. It writes `to_dense` (the plain matrix from its tensors; the base makes it
    differentiable) and, to be made from one, a classmethod `from_dense`. Every torch function then
    works, by the dense fallback; `@sl.route(torch.mm, input=MyLayout)` adds a sparse one.
    Construction: `MyLayout(*tensors, shape=..., **static)`.

    Gradients come in the same layout. Transforms of `torch.func` with respect to a layout raise:
    they hide the subclass.

    >>> import torch, sparse_layouts as sl
    >>> class Diagonal(sl.LayoutTensor):
    ...     fields = ("entries",)
    ...     def to_dense(self):
    ...         return torch.diag(self.inner_entries)
    >>> d = Diagonal(torch.tensor([1.0, 2.0]), shape=(2, 2))
    >>> @sl.route(torch.mm, input=Diagonal)
    ... def scale_rows(input, mat2):
    ...     return input.inner_entries[:, None] * mat2
    >>> d @ torch.ones(2, 1)
    tensor([[1.],
            [2.]])
    >>> scale_rows.unregister()
    """

    fields: ClassVar[tuple[str, ...]] = ()
    static_fields: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def __new__(
        cls: type[L],
        *inner: Tensor | None,
        shape: Any,
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
        **static: Any,
    ) -> L:
        """A layout of these inner tensors, in the order of `fields`; None where a field is left
        out.
        """
        if len(inner) != len(cls.fields):
            raise TypeError(
                f"{cls.__name__}: expected {len(cls.fields)} tensors ({', '.join(cls.fields)}), "
                f"got {len(inner)}"
            )
        if set(static) != set(cls.static_fields):
            raise TypeError(
                f"{cls.__name__}: expected the static fields {cls.static_fields}, got "
                f"{tuple(static)}"
            )
        present = next(t for t in inner if t is not None)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            dtype=dtype if dtype is not None else present.dtype,
            device=present.device,
            requires_grad=requires_grad,
        )
        for name, tensor in zip(cls.fields, inner, strict=True):
            setattr(self, "inner_" + name, tensor)
        for name, value in static.items():
            setattr(self, name, value)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch.Tensor's own __init__ takes no arguments
        super().__init__()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (
            "to_dense" in cls.__dict__
        ):  # a layout's own: the differentiable one of the base calls it
            cls.to_dense_entries = cls.__dict__["to_dense"]  # type: ignore[method-assign]
            del cls.to_dense
        torch.serialization.add_safe_globals([cls, rebuild])

    def inner_tensors(self) -> tuple[Tensor | None, ...]:
        """The inner tensors in the order of `fields`."""
        return tuple(getattr(self, "inner_" + name) for name in self.fields)

    def static(self) -> dict[str, Any]:
        """The static metadata by name."""
        return {name: getattr(self, name) for name in self.static_fields}

    @property
    def stored_values(self) -> Tensor | None:
        """The tensor of stored values as it lies in memory, None for a mask.

        Not differentiable: see `values()`.
        """
        return getattr(self, "inner_" + self.fields[0])

    def like_self(self: L, values: Tensor | None) -> L:
        """The same layout with other stored values (same shape; any dtype)."""
        inner = (values, *self.inner_tensors()[1:])
        dtype = self.dtype if values is None else values.dtype
        return type(self)(*inner, shape=self.shape, dtype=dtype, **self.static())

    def map_inner(self: L, function: Callable[[Tensor], Tensor], values: Tensor | None) -> L:
        """The same layout, `function` applied to every tensor but the values, which are given."""
        rest = [None if t is None else function(t) for t in self.inner_tensors()[1:]]
        dtype = self.dtype if values is None else values.dtype
        return type(self)(values, *rest, shape=self.shape, dtype=dtype, **self.static())

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(M, N), the last two sizes; cheaper than `shape`, which torch asks `__torch_function__`
        about.
        """
        with torch._C.DisableTorchFunctionSubclass():
            shape = self.shape
        return shape[-2], shape[-1]

    @property
    def pattern_dims(self) -> int:
        """How many of the last dimensions the pattern has; those before it are the batch, with
        values of its own on one pattern. All, unless a layout knows of batches.
        """
        with torch._C.DisableTorchFunctionSubclass():
            return self.dim()

    def transposed(self) -> LayoutTensor | None:
        """The transposed layout on the same values, not differentiable; None where a layout has
        none: its transpose is dense.
        """
        return None

    def to_dense_entries(self) -> Tensor:
        """The plain matrix from the inner tensors, not differentiable: what a layout writes as
        `to_dense`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no to_dense()")

    def sample(self: L, dense: Tensor) -> L:
        """The entries of `dense` (this layout's shape) that this layout stores, in this layout; not
        differentiable.

        This one works for any layout: it densifies 1..nnz to learn which stored value is which
        entry.
        """
        values = self.stored_values
        assert values is not None, "a mask layout samples by its own method"
        number = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.float64)
        place = self.like_self(number.view(values.shape)).to_dense_entries().long().flatten()
        found = place.new_zeros(values.numel() + 1).scatter_(
            0, place, torch.arange(place.numel(), device=place.device)
        )
        return self.like_self(dense.reshape(-1)[found[1:]].view(values.shape).to(dense.dtype))

    def same_pattern(self, other: LayoutTensor) -> bool:
        """Whether both store the same entries in the same places.

        By identity of the index tensors, else by content.
        """
        if type(self) is not type(other) or self.shape != other.shape:
            return False
        if self.static() != other.static():
            return False
        return same_indices(self.inner_tensors()[1:], other.inner_tensors()[1:])

    def clear_unstored(self) -> None:
        """Sets to zero what `values` holds room for but the layout does not store; most layouts
        have no such room.
        """

    def forget_derived(self) -> None:
        """Drops what this object keeps besides its inner tensors, after those were exchanged."""

    def to_dense(
        self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None
    ) -> Tensor:
        """The plain matrix, differentiable: its gradient is sampled onto this layout.

        >>> import torch, sparse_layouts as sl
        >>> sl.bsr(torch.eye(32), block_size=16).to_dense().sum()
        tensor(32.)
        """
        from sparse_layouts.layout_autograd import ToDense, apply

        if torch.is_grad_enabled() and self.requires_grad:
            dense = apply(ToDense, self)
        else:
            dense = self.to_dense_entries()
        return dense if dtype is None else dense.to(dtype)

    def to_scipy(self) -> Any:
        """The matrix as `scipy.sparse.csr_array`, by way of the dense one unless the layout knows
        better; nested lists over leading dimensions.
        """
        import scipy.sparse

        dense = self.to_dense_entries()
        return each_matrix(dense, lambda one: scipy.sparse.csr_array(scipy_data(one)))

    def to_torch_sparse(self) -> Any:
        """The matrix as a `torch.sparse_csr` tensor, by way of the dense one unless the layout
        knows better; nested lists over leading dimensions.
        """
        return each_matrix(self.to_dense_entries().detach(), Tensor.to_sparse_csr)

    @property
    def nnz(self) -> int:
        """Stored entries."""
        values = self.stored_values
        assert values is not None
        return values.numel()

    @property
    def density(self) -> float:
        """Stored entries over all entries; 0 for a matrix without entries."""
        return self.nnz / max(1, self.shape.numel())

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that the tensor keeps alive: values and indices; derived schedules apart, in
        `cached_bytes`.
        """
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in self.inner_tensors()
            # in a mapped file an empty tensor lies where the next one begins
            if t is not None and t.untyped_storage().nbytes()
        }
        return sum(storages.values())

    @property
    def cached_bytes(self) -> int:
        """Bytes of what has been derived from the pattern and is kept with it."""
        return 0

    def prepack(self: L) -> L:
        """This tensor in the storage order that the device's kernels want; the same tensor where
        there is no other order.
        """
        return self

    def in_order_of(self: L, like: LayoutTensor) -> L:
        """This layout, its values stored in the order of those of `like`, which has the same
        pattern; not differentiable. Itself, unless a layout knows of several orders.
        """
        return self

    def validate(self) -> None:
        """Raises `ValueError` naming the first broken invariant; a layout adds its own."""

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = ["inner_" + n for n in self.fields if getattr(self, "inner_" + n) is not None]
        return names, (type(self), tuple(self.static().items()), self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> LayoutTensor:
        cls, static, dtype = context
        tensors = [inner.get("inner_" + name) for name in cls.fields]
        if tensors[0] is not None:
            dtype = tensors[0].dtype
        return cls(*tensors, shape=outer_size, dtype=dtype, **dict(static))

    def _stable_hash_for_caching(self) -> str:
        """What torch's compile cache tells layouts apart by: everything that traced code depends
        on, this library's own code included.
        """
        names, (cls, static, dtype) = self.__tensor_flatten__()
        code = library_stamp()
        return f"{cls.__module__}.{cls.__qualname__} {names} {static} {dtype} {code}"

    def __coerce_same_metadata_as_tangent__(
        self, metadata: Any, expected_type: type | None = None
    ) -> Tensor | None:
        if expected_type is not None and expected_type is torch.Tensor:
            return self.to_dense_entries()
        return self if metadata == self.__tensor_flatten__()[1] else None

    @classmethod
    def keeps(cls, function: Callable[..., Any]) -> bool:
        """Whether torch's own function, applied to this layout, works on the stored entries and
        keeps the layout.
        """
        return keeps_layout(function)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if not torch.compiler.is_dynamo_compiling() and func in ROUTES.shortcuts:
            for recall in ROUTES.shortcuts[func]:
                result = recall(args, kwargs)
                if result is not NotImplemented:
                    return result
        if not keeps_layout(func):
            if torch.compiler.is_exporting():
                args, kwargs = opened(args), opened(kwargs)
            result = call_route(func, args, kwargs)
            if result is NotImplemented and called_by_optimizer():
                result = on_entries(func, args, kwargs)
            if result is NotImplemented:
                return fall_back(func, args, kwargs)
            return result
        name = getattr(func, "__name__", "")
        if name == "__get__":
            pass  # the most frequent of all: w.shape
        elif name == "__set__":
            if func == _SET_DATA:
                return set_data(*args)
        elif name.endswith("_") and writes_entries(func):
            targets = layouts_in(first_argument(args, kwargs))
            if not targets:  # a dense target, and a layout as operand
                if func is torch.Tensor.copy_:
                    return func(*densified(args), **densified(kwargs))
                return fall_back(func, args, kwargs)
            if not torch.compiler.is_compiling():
                for target in targets:
                    target.check_writable(func)
        elif (
            name.endswith("_like")
            and kwargs.get("dtype") not in (None, torch.bool)
            and first_argument(args, kwargs).stored_values is None
        ):
            result = call_route(func, args, kwargs)  # a mask has no values to be zero
            return fall_back(func, args, kwargs) if result is NotImplemented else result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = handler_of(func)
        if handler is None:
            raise NotImplementedError(
                f"{func} reached a {cls.__name__} below autograd, where only work on stored "
                f"entries is done. "
                "Transforms of torch.func and code behind the dispatcher do that: differentiate "
                "with respect to dense operands, "
                "or pass w.to_dense()."
            )
        return handler(func, args, {} if kwargs is None else kwargs)

    def check_writable(self, function: Callable[..., Any]) -> None:
        """Raises where an in-place function would be lost to autograd: on a layout that shares its
        values with its transpose, as long as both are differentiated.
        """
        if not getattr(self, "_shares_values", False) or not torch.is_grad_enabled():
            return
        if self.requires_grad:
            name = getattr(function, "__name__", "in-place function")
            raise RuntimeError(
                f"{name}: expected a layout with values of its own, got one that shares them with "
                "its transpose, whose gradient would not know of the change. Write to a copy: "
                "w.mT.clone(), or w * 2 instead of w.mul_(2)."
            )

    def share_memory_(self: L) -> L:
        """Moves every inner tensor to shared memory."""
        for tensor in self.inner_tensors():
            if tensor is not None:
                tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether every inner tensor is in shared memory."""
        return all(t.is_shared() for t in self.inner_tensors() if t is not None)

    def record_stream(self, stream: Any) -> None:
        """Marks every inner tensor as used by a CUDA stream."""
        for tensor in self.inner_tensors():
            if tensor is not None:
                tensor.record_stream(stream)

    def is_set_to(self, tensor: Tensor) -> bool:
        """Whether both are one layout on the same memory."""
        if type(self) is not type(tensor) or self.static() != tensor.static():
            return False
        pairs = zip(self.inner_tensors(), tensor.inner_tensors(), strict=True)
        return all(a is b or (a is not None and b is not None and a.is_set_to(b)) for a, b in pairs)

    def __format__(self, format_spec: str) -> str:
        # torch's own would go through the fallback
        return object.__format__(self, format_spec)

    def __deepcopy__(self: L, memo: dict[int, Any]) -> L:
        """A copy with values of its own; the pattern, which nothing changes, is shared."""
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only layouts created explicitly by the user support deepcopy; use .detach() first"
            )
        values = self.stored_values
        copy = self.like_self(None if values is None else values.detach().clone())
        copy.requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        if getattr(self, "_is_param", False):
            copy._is_param = True
        if self.grad is not None:
            copy.grad = self.grad.__deepcopy__(memo)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_parameter = bool(getattr(self, "_is_param", False))
        values, *rest = self.inner_tensors()
        inner = (None if values is None else values.detach(), *rest)
        return rebuild, (
            type(self),
            inner,
            tuple(self.static().items()),
            tuple(self.shape),
            self.dtype,
            self.requires_grad,
            is_parameter,
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "\n".join(folded(self.one_line(), terminal_width(), "    "))

    def one_line(self) -> str:
        """The repr on one line, however wide the terminal: for messages and logs."""
        shape = ", ".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{type(self).__name__}([{shape}], {dtype}, {self.device}"
        details = "".join(f", {line}" for line in self.describe())
        grad = ", requires_grad" if self.requires_grad else ""
        return text + details + grad + ")"

    def _repr_html_(self) -> str:
        from sparse_layouts.viewing.representation import as_html

        return as_html(self)

    def plot(self, **options: Any) -> Any:
        """Draws the pattern with matplotlib (extra `viz`), a panel a different head; returns the
        figure. `sparse_layouts.viewing.plots.plot` has the options and the errors.

        >>> import sparse_layouts as sl
        >>> figure = sl.causal(256, block_size=32).plot()
        >>> figure.axes[0].get_ylabel()
        'query token'
        """
        from sparse_layouts.viewing.plots import plot

        return plot(self, **options)

    def describe(self) -> list[str]:
        """Short facts for the repr."""
        return [f"density {self.density:.2%}"]


def rebuild(
    cls: type[L],
    inner: tuple[Tensor | None, ...],
    static: tuple[tuple[str, Any], ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    requires_grad: bool,
    is_parameter: bool,
) -> L:
    """Makes a layout again from what pickle kept of it.

    `torch.load(weights_only=True)` calls it with whatever a file holds, so it takes layouts alone
    and checks what costs nothing: kinds, names, sizes and the dtype. Not contents, which a file of
    the older format fills in later: call `validate()` on a layout from somebody else.
    """
    if not (isinstance(cls, type) and issubclass(cls, LayoutTensor)):
        raise TypeError(f"rebuild: expected a layout class, got {short(cls)}")
    named = dict(static)
    if set(named) != set(cls.static_fields) or len(inner) != len(cls.fields):
        raise ValueError(
            f"rebuild: expected the fields {cls.fields} and {cls.static_fields} of a "
            f"{cls.__name__}, got {len(inner)} tensors and {tuple(named)}"
        )
    if all(t is None for t in inner) or not all(t is None or isinstance(t, Tensor) for t in inner):
        raise TypeError(f"rebuild: expected a tensor or None for each of {cls.fields}")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"rebuild: expected sizes from 0, got {shape}")
    if dtype != (dtype if inner[0] is None else inner[0].dtype):
        raise ValueError(
            f"rebuild: expected the dtype of {cls.fields[0]}, {inner[0].dtype}, got {dtype}"  # type: ignore[union-attr]
        )
    layout = cls(*inner, shape=shape, dtype=dtype, **named)
    layout.requires_grad_(requires_grad)
    if is_parameter:
        layout._is_param = True
    return layout


@functools.cache
def library_stamp() -> str:
    """Which files this library consists of and when they were written.

    Code that torch.compile keeps on disk was traced through them, and outlives them.
    """
    here = Path(__file__).parent
    folders = (here, *(parent / name for parent in (here, here.parent) for name in _FOLDERS))
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    stats = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


_FOLDERS = ("dispatch", "kernels")  # beside this folder in a source checkout, below it installed
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def set_data(target: Tensor, source: Any) -> None:
    """`w.data = x`: w gets x's tensors, where x is a layout of the same kind, size and dtype."""
    names = None
    if isinstance(target, LayoutTensor) and type(source) is type(target):
        names = [name for name in target.fields if getattr(target, "inner_" + name) is not None]
    if (
        names is None
        or target.shape != source.shape
        or target.dtype != source.dtype
        or target.device != source.device
        or target.static() != source.static()  # type: ignore[attr-defined]
        or names != [name for name in target.fields if getattr(source, "inner_" + name) is not None]  # type: ignore[attr-defined]
    ):
        raise TypeError(
            f"data: expected the data of {short(target)} to stay one of its kind (class, shape, "
            f"dtype, device, block size), got {short(source)}. Copy the entries instead: "
            "w.copy_(x.sparse_mask(w)); or make a new tensor of x."
        )
    for name in names:
        tensor = getattr(source, "inner_" + name)
        setattr(target, "inner_" + name, tensor.detach())
    target.forget_derived()  # type: ignore[attr-defined]
