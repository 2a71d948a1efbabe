"""Routes: registration, faces, inheritance, and a user's own layout in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch.faces import name_of
from tests.rounding import assert_close

# --- the worked example: scipy's compressed columns -----------------------------------------------


class ColumnsTensor(sl.LayoutTensor):
    """A user's layout: compressed sparse columns, multiplied by scipy."""

    fields = ("data", "indices", "indptr")

    @classmethod
    def from_dense(cls, dense: Tensor) -> ColumnsTensor:
        m = scipy.sparse.csc_array(dense.detach().numpy())
        return cls(*map(torch.from_numpy, (m.data, m.indices, m.indptr)), shape=m.shape)

    def scipy_view(self) -> scipy.sparse.csc_array:
        arrays = [t.detach().numpy() for t in self.inner_tensors()]
        return scipy.sparse.csc_array(tuple(arrays), shape=tuple(self.shape))

    def to_dense_entries(self) -> Tensor:
        return torch.from_numpy(self.scipy_view().toarray())


def columns_times_dense(input: ColumnsTensor, mat2: Tensor) -> Tensor:
    return torch.from_numpy(input.scipy_view() @ mat2.detach().numpy())


@pytest.fixture
def columns() -> ColumnsTensor:
    dense = torch.randn(5, 4, dtype=torch.float64) * (torch.rand(5, 4) < 0.5)
    return ColumnsTensor.from_dense(dense)


@pytest.fixture
def routed() -> Iterator[Callable[..., Tensor]]:
    handler = sl.route(torch.mm, input=ColumnsTensor)(columns_times_dense)
    yield handler
    handler.unregister()


X = torch.arange(12, dtype=torch.float64).view(4, 3)
FACES: dict[str, Callable[[Tensor], Tensor]] = {
    "@": lambda w: w @ X,
    "mm": lambda w: torch.mm(w, X),
    "Tensor.mm": lambda w: w.mm(X),
    "matmul": lambda w: torch.matmul(w, X),
    "Tensor.matmul": lambda w: w.matmul(X),
    "linalg.matmul": lambda w: torch.linalg.matmul(w, X),
    "vector": lambda w: w @ X[:, 0],
    "linear": lambda w: F.linear(X.mT, w),
    "linear batch": lambda w: F.linear(X.mT.expand(2, 3, 4), w, torch.ones(5, dtype=w.dtype)),
    "addmm": lambda w: torch.addmm(torch.ones(5, 3, dtype=w.dtype), w, X, beta=2, alpha=3),
    "Tensor.addmm": lambda w: torch.ones(5, 3, dtype=w.dtype).addmm(w, X),
    "einsum": lambda w: torch.einsum("ij,jk->ki", w, X),
}


@pytest.mark.parametrize("name", FACES)
def test_one_route_serves_every_face(
    name: str, columns: ColumnsTensor, routed: Callable[..., Tensor]
) -> None:
    with sl.fallback("error"):
        result = FACES[name](columns)
    assert_close(result, FACES[name](columns.to_dense()))


@pytest.mark.parametrize("name", FACES)
def test_without_its_route_it_falls_back(name: str, columns: ColumnsTensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning, match="ColumnsTensor"):
        result = FACES[name](columns)
    assert torch.equal(result, FACES[name](columns.to_dense()))


def test_everything_else_falls_back_with_gradients(columns: ColumnsTensor) -> None:
    with sl.fallback("allow"):
        (columns.requires_grad_() @ X).square().sum().backward()
    dense = columns.detach().to_dense().requires_grad_()
    (dense @ X).square().sum().backward()
    assert type(columns.grad) is ColumnsTensor
    stored = columns.detach().to_dense() != 0
    torch.testing.assert_close(columns.grad.to_dense(), dense.grad * stored)


# --- registering ----------------------------------------------------------------------------------


def test_a_second_registration_names_both_places(routed: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"registered twice") as error:

        @sl.route(torch.Tensor.mm, input=ColumnsTensor)  # a face of torch.mm: the same row
        def again(input: Tensor, mat2: Tensor) -> Tensor:
            return mat2

    text = str(error.value)
    assert text.count("test_routes.py:") == 2
    assert "torch.mm(input=ColumnsTensor)" in text
    assert ".unregister()" in text


def test_unregister(columns: ColumnsTensor, routed: Callable[..., Tensor]) -> None:
    with sl.fallback("error"):
        columns @ X
    routed.unregister()
    with sl.fallback("error"), pytest.raises(sl.DenseFallbackError):
        columns @ X
    routed.unregister()  # a second time does nothing
    assert "ColumnsTensor" not in repr(sl.table())
    sl.route(torch.mm, input=ColumnsTensor)(routed)
    assert "ColumnsTensor" in repr(sl.table())


def test_one_handler_on_two_functions_unregisters_from_both(columns: ColumnsTensor) -> None:
    @sl.route(torch.trace, input=ColumnsTensor)
    @sl.route(torch.numel, input=ColumnsTensor)
    def handler(input: Tensor) -> str:
        return "handled"

    assert torch.trace(columns) == "handled"
    handler.unregister()
    assert "ColumnsTensor" not in repr(sl.table())


@pytest.mark.parametrize(
    ("register", "kind", "message"),
    [
        (lambda: sl.route(torch.mm), TypeError, "name at least one operand"),
        (lambda: sl.route(torch.mm, input=Tensor), TypeError, "not a layout class"),
        (lambda: sl.route(torch.mm, input="BSRTensor"), TypeError, "not a layout class"),
        (
            lambda: sl.route(torch.mm, weight=ColumnsTensor)(columns_times_dense),
            ValueError,
            "torch.mm has no operand weight; it has input, mat2",
        ),
    ],
)
def test_wrong_registrations(
    register: Callable[[], object], kind: type[Exception], message: str
) -> None:
    before = repr(sl.table())
    with pytest.raises(kind, match=message):
        register()
    assert repr(sl.table()) == before


# --- which route is taken -------------------------------------------------------------------------


def test_a_subclass_inherits_and_the_most_special_route_wins(columns: ColumnsTensor) -> None:
    class Child(ColumnsTensor):
        pass

    class Grandchild(Child):
        pass

    @sl.route(torch.trace, input=sl.LayoutTensor)
    def for_all(input: Tensor) -> str:
        return "all"

    @sl.route(torch.trace, input=ColumnsTensor)
    def for_columns(input: Tensor) -> str:
        return "columns"

    try:
        inner, shape = columns.inner_tensors(), columns.shape
        child, grandchild = Child(*inner, shape=shape), Grandchild(*inner, shape=shape)
        assert torch.trace(child) == torch.trace(grandchild) == "columns"
        assert torch.trace(sl.bsr(torch.eye(4), 2)) == "all"

        @sl.route(torch.trace, input=Child)
        def for_child(input: Tensor) -> str:
            return "child"

        assert torch.trace(columns) == "columns"
        assert torch.trace(child) == torch.trace(grandchild) == "child"
        for_child.unregister()
        assert torch.trace(grandchild) == "columns"
    finally:
        for_columns.unregister()
        for_all.unregister()


def test_local_stride_inherits_the_routes_of_blocks() -> None:
    mask = sl.local_stride(32, block_size=8, local_blocks=1, vert_stride=2)
    w = torch.randn(32, 32).sparse_mask(mask)
    assert type(w) is sl.LocalStrideTensor
    with sl.fallback("error"):
        assert torch.equal(w @ torch.eye(32), w.to_dense())


def test_a_route_may_decline(columns: ColumnsTensor) -> None:
    @sl.route(torch.mm, input=ColumnsTensor)
    def small_only(input: Tensor, mat2: Tensor) -> object:
        return NotImplemented if mat2.shape[1] > 2 else mat2.new_full((5, mat2.shape[1]), 7.0)

    try:
        assert bool((columns @ X[:, :2] == 7).all())
        with pytest.warns(sl.DenseFallbackWarning):
            assert torch.equal(columns @ X, columns.to_dense() @ X)
    finally:
        small_only.unregister()


def test_a_route_wants_exactly_its_operands(
    columns: ColumnsTensor, routed: Callable[..., Tensor]
) -> None:
    other = ColumnsTensor.from_dense(X)
    for call in (lambda: columns @ other, lambda: torch.mm(X, columns.mT), lambda: X.mT @ other):
        with sl.fallback("error"), pytest.raises(sl.DenseFallbackError):
            call()


def test_an_error_in_a_handler_is_an_error(columns: ColumnsTensor) -> None:
    @sl.route(torch.mm, input=ColumnsTensor)
    def broken(input: Tensor, mat2: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")

    try:
        with sl.fallback("allow"), pytest.raises(ZeroDivisionError, match="on purpose"):
            columns @ X
    finally:
        broken.unregister()


def test_operands_by_keyword(columns: ColumnsTensor, routed: Callable[..., Tensor]) -> None:
    with sl.fallback("error"):
        result = torch.mm(input=columns, mat2=X)
    assert torch.equal(result, columns @ X)
    w = sl.bsr(torch.eye(4), 2)
    with sl.fallback("error"):
        assert torch.equal(torch.matmul(input=w, other=torch.ones(4, 1)), torch.ones(4, 1))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.matmul, "torch.matmul"),
        (torch.Tensor.__matmul__, "Tensor.__matmul__"),
        (torch.Tensor.mT.__get__, "Tensor.mT"),
        (F.linear, "F.linear"),
        (F.scaled_dot_product_attention, "F.scaled_dot_product_attention"),
        (torch.linalg.norm, "linalg.norm"),
    ],
)
def test_names_are_what_a_person_would_write(function: Callable[..., object], name: str) -> None:
    assert name_of(function).endswith(name)
