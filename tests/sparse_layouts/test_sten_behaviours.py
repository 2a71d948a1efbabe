"""What STen's users rely on, as it is here: the same ideas, in this library's words.

STen: https://github.com/spcl/sten (tests/test_api.py, tests/test_dispatch.py) and
https://arxiv.org/abs/2304.07613. There a tensor is wrapped, an operator has four formats for each
output and as many for its gradient, and a failed dispatch warns or raises; here a layout is a
tensor, `sl.sparsified` has a pair for each, and the fallback policy says what a missing route does.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_layouts as sl
from tests.sparse_layouts.sten_layouts import F64, LAYOUTS, as_dense, blocks, some, stored
from tests.sparse_layouts.user_csc import CscTensor

Check = Callable[..., None]
STEPS = 10


@pytest.fixture(params=LAYOUTS)
def make(request: pytest.FixtureRequest) -> Callable[[Tensor], sl.LayoutTensor]:
    """A layout of half of a dense matrix."""
    return LAYOUTS[request.param]


@pytest.fixture
def w(make: Callable[[Tensor], sl.LayoutTensor]) -> sl.LayoutTensor:
    return make(torch.randn(24, 40, dtype=F64)).requires_grad_()


# --- a graph, its formats chosen tensor by tensor -------------------------------------------------

FORMS = {
    "blocks": (sl.Magnitude(0.5), blocks),
    "csr": (sl.Magnitude(0.5), sl.csr),
    "user's": (sl.Magnitude(0.5), CscTensor),
    "chosen": (sl.Magnitude(0.5), None),
    "dense": None,
}


def formed(dense: Tensor, form: str) -> Tensor:
    """What a form keeps of a dense tensor."""
    if form == "dense":
        return dense
    return LAYOUTS["blocks"](dense).to_dense() if form == "blocks" else some(dense)


@pytest.mark.parametrize("grad", FORMS)
@pytest.mark.parametrize("out", FORMS)
@pytest.mark.parametrize("operand", [*LAYOUTS, "dense"])
def test_a_graph(operand: str, out: str, grad: str, assert_close: Check) -> None:
    """d = (a @ b + c): a in one format, the sum in another, its gradient in a third."""
    whole = torch.randn(24, 16, dtype=F64)
    a = whole.requires_grad_() if operand == "dense" else LAYOUTS[operand](whole).requires_grad_()
    b = torch.randn(16, 40, dtype=F64, requires_grad=True)
    c = torch.randn(24, 40, dtype=F64, requires_grad=True)
    seed = torch.randn(24, 40, dtype=F64)
    if out == grad == "dense":
        add = torch.add
    else:
        add = sl.sparsified(torch.add, out=FORMS[out], grad=FORMS[grad])

    with sl.fallback("allow"):
        d = add(a @ b, c)
        (d * seed).sum().backward()

    expected = a.detach().to_dense() if operand != "dense" else a.detach()
    total = expected @ b.detach() + c.detach()
    assert_close(as_dense(d), formed(total, out))
    arrived = torch.where(formed(total, out) != 0, seed, 0)
    taken = formed(arrived, grad)
    classes = {"blocks": sl.BSRTensor, "csr": sl.CSRTensor, "user's": CscTensor}
    assert type(d) is classes.get(out, Tensor)
    assert type(a.grad) is type(a)
    assert type(b.grad) is Tensor
    assert type(c.grad) is classes.get(grad, Tensor)  # a leaf that gets the gradient itself
    assert_close(as_dense(c.grad), taken)
    assert_close(b.grad, expected.mT @ taken)
    of_a = taken @ b.detach().mT
    assert_close(as_dense(a.grad), of_a if operand == "dense" else of_a * stored(a))


def test_an_op_on_a_sparsified_result(assert_close: Check) -> None:
    """The second op's gradient finds its way back through the first one's layout."""
    x = torch.randn(24, 40, dtype=F64, requires_grad=True)
    sparse_abs = sl.sparsified(torch.abs, out=(sl.Magnitude(0.4), CscTensor))
    z = torch.abs(sparse_abs(x))
    assert type(z) is CscTensor  # zeros stay zero
    seed = torch.randn(24, 40, dtype=F64)
    with sl.fallback("allow"):
        (z * seed).sum().backward()
    assert_close(x.grad, torch.where(sl.Magnitude(0.4).keep(x.detach()), seed * x.sign(), 0))


# --- models ---------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """A linear layer written from scratch: its weight is a layout."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


SIZES = (48, 40, 32, 24, 32, 16)


def mlp(linear: Callable[[int, int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        layers += [linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def twins(
    to_layout: Callable[[Tensor], sl.LayoutTensor],
) -> tuple[nn.Sequential, nn.Sequential]:
    """A dense MLP, and one with layouts for weights; equal where the layouts store an entry."""
    dense = mlp(lambda i, o: nn.Linear(i, o, dtype=F64))
    weights = iter([m for m in dense if isinstance(m, nn.Linear)])

    def linear(inputs: int, outputs: int) -> nn.Module:
        layer = next(weights)
        made = SparseLinear(to_layout(layer.weight.detach()), layer.bias.detach().clone())
        with torch.no_grad():
            layer.weight.copy_(made.weight.to_dense())
        return made

    return dense, mlp(linear)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith("weight")]


def test_an_mlp_from_scratch(
    make: Callable[[Tensor], sl.LayoutTensor], assert_close: Check
) -> None:
    dense, sparse = twins(make)
    inputs = [torch.randn(15, 48, dtype=F64, requires_grad=True)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    seed = torch.rand(15, 16, dtype=F64)
    with sl.fallback("allow"):
        outputs = [model(x) for model, x in zip((dense, sparse), inputs, strict=True)]
        for output in outputs:
            output.backward(seed)
    assert_close(outputs[1], outputs[0])
    assert_close(inputs[1].grad, inputs[0].grad)
    for mine, its in zip(sparse.parameters(), dense.parameters(), strict=True):
        if isinstance(mine, sl.LayoutTensor):
            assert type(mine.grad) is type(mine.data)
            assert mine.grad.same_pattern(mine)
            assert_close(mine.grad, its.grad * stored(mine))
        else:
            assert_close(mine.grad, its.grad)


def test_an_mlp_takes_its_twins_state(assert_close: Check) -> None:
    """With everything stored, a dense state dict goes into layouts and back."""
    dense, sparse = twins(functools.partial(sl.bsr, block_size=8, keep=sl.KeepAll()))
    other = mlp(lambda i, o: nn.Linear(i, o, dtype=F64))
    sparse.load_state_dict(other.state_dict())
    x = torch.randn(15, 48, dtype=F64)
    assert_close(sparse(x), other(x))
    dense.load_state_dict(sparse.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(weights_of(dense), weights_of(other), strict=True))


def test_an_existing_model_is_made_sparse(
    make: Callable[[Tensor], sl.LayoutTensor], assert_close: Check
) -> None:
    """A weight, and the result of an activation inside the model."""
    model = nn.TransformerEncoderLayer(
        32, 4, dim_feedforward=64, dropout=0.0, batch_first=True, dtype=F64
    )
    sparse, pruned = copy.deepcopy(model), copy.deepcopy(model)
    sparse.linear1.weight = nn.Parameter(make(model.linear1.weight.detach()))
    pair = (sl.Magnitude(0.5), functools.partial(sl.bsr, block_size=(8, 16)))
    sparse.activation = sl.sparsified(F.relu, out=pair)
    pruned.linear1.weight = nn.Parameter(sparse.linear1.weight.detach().to_dense())
    pruned.activation = lambda x: pair[1](F.relu(x), keep=pair[0]).to_dense()
    x = torch.randn(2, 8, 32, dtype=F64)
    with sl.fallback("allow"):
        found, expected = sparse(x), pruned(x)
        assert_close(found, expected)
        seed = torch.randn_like(found)
        found.backward(seed)
    expected.backward(seed)
    assert type(sparse.linear1.weight.grad) is type(sparse.linear1.weight.data)
    assert_close(
        sparse.linear1.weight.grad,
        pruned.linear1.weight.grad * stored(sparse.linear1.weight),
    )
    assert_close(sparse.linear2.weight.grad, pruned.linear2.weight.grad)


def test_pruned_training_keeps_the_layout(
    make: Callable[[Tensor], sl.LayoutTensor], assert_close: Check
) -> None:
    """Pruned by magnitude, then AdamW: as the dense twin whose gradients are pruned alike."""
    dense, sparse = twins(make)
    masks = [stored(w) for w in weights_of(sparse)]
    before = [w.detach().clone() for w in weights_of(sparse)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (dense, sparse)]
    x, target = torch.randn(20, 48, dtype=F64), torch.randn(20, 16, dtype=F64)
    with sl.fallback("allow"):
        for _ in range(STEPS):
            for model, optimizer in zip((dense, sparse), optimizers, strict=True):
                optimizer.zero_grad()
                F.mse_loss(model(x), target).backward()
                if model is dense:
                    for weight, mask in zip(weights_of(dense), masks, strict=True):
                        weight.grad *= mask
                optimizer.step()
    for mine, its, old, mask in zip(
        weights_of(sparse), weights_of(dense), before, masks, strict=True
    ):
        assert isinstance(mine, nn.Parameter)
        assert mine.same_pattern(old)
        assert torch.equal(stored(mine), mask)
        assert type(mine.grad) is type(mine.data) is type(old)
        assert not torch.equal(mine.to_dense(), old.to_dense())
        # ten steps lose ten times what one loses
        assert_close(mine.detach(), its, scale=STEPS * its.detach().norm().item())


# --- gradients stay in their layout ---------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_gradients_layout_is_kept(
    set_to_none: bool, w: sl.LayoutTensor, assert_close: Check
) -> None:
    weight = nn.Parameter(w.detach())
    optimizer = torch.optim.AdamW([weight])
    x = torch.randn(40, 3, dtype=F64)
    expected = (torch.ones(24, 3, dtype=F64) @ x.mT) * stored(w)
    for _ in range(3):
        with sl.fallback("allow"):
            (weight @ x).sum().backward()
            assert_close(weight.grad, expected)
            (weight @ x).sum().backward()
        assert type(weight.grad) is type(w)
        assert weight.grad.same_pattern(w)
        assert_close(weight.grad, 2 * expected)
        optimizer.step()
        assert weight.requires_grad
        optimizer.zero_grad(set_to_none=set_to_none)
        assert (weight.grad is None) == set_to_none
        if not set_to_none:
            assert type(weight.grad) is type(w)
            assert not weight.grad.to_dense().any()


# --- a layout with kernels of its own, and without ------------------------------------------------


class ColumnsProduct(torch.autograd.Function):
    """`w @ x` of compressed columns, forward and backward from the stored entries alone."""

    @staticmethod
    def forward(ctx: object, w: CscTensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return torch.from_numpy(as_scipy(w) @ x.detach().numpy())

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        w, x = ctx.saved_tensors
        columns = torch.repeat_interleave(w.inner_indptr.diff())
        of_values = (grad[w.inner_indices.long()] * x[columns]).sum(1)
        return w.like_self(of_values), torch.from_numpy(as_scipy(w).T @ grad.numpy())


def as_scipy(w: CscTensor) -> object:
    import scipy.sparse

    return scipy.sparse.csc_array(
        tuple(t.detach().numpy() for t in w.inner_tensors()), tuple(w.shape)
    )


@pytest.fixture
def kernels() -> Iterator[None]:
    @sl.route(torch.mm, input=CscTensor)
    def columns_product(input: CscTensor, mat2: Tensor) -> Tensor:
        return ColumnsProduct.apply(input, mat2)

    @sl.route(torch.mul, input=CscTensor, other=CscTensor)
    def columns_times_columns(input: CscTensor, other: CscTensor) -> CscTensor:
        product = as_scipy(input).multiply(as_scipy(other)).tocsc()
        inner = map(torch.from_numpy, (product.data, product.indices, product.indptr))
        return CscTensor(*inner, shape=input.shape)

    yield
    columns_product.unregister()
    columns_times_columns.unregister()


def run_graph(sparse: bool) -> list[Tensor]:
    """d = (a + b) @ c, the sum in the user's layout or dense; d and the gradients."""
    torch.manual_seed(3)
    a, b = (torch.randn(10, 20, dtype=F64, requires_grad=True) for _ in range(2))
    c = torch.randn(20, 30, dtype=F64, requires_grad=True)
    pair = (sl.KeepAll(), CscTensor)
    add = sl.sparsified(torch.add, out=pair, grad=pair) if sparse else torch.add
    d = torch.mm(add(a, b), c)
    d.backward(torch.randn(10, 30, dtype=F64))
    return [d, a.grad, b.grad, c.grad]


def test_a_layout_with_kernels_of_its_own(kernels: None, assert_close: Check) -> None:
    with sl.fallback("error"), sl.trace() as steps:
        found = run_graph(sparse=True)
    assert [s.kernel.rpartition(".")[2] for s in steps] == ["columns_product"]
    assert [type(t) for t in found] == [Tensor, CscTensor, CscTensor, Tensor]
    for actual, expected in zip(found, run_graph(sparse=False), strict=True):
        assert_close(as_dense(actual), expected)


def test_kernels_of_ones_own_pass_gradcheck(kernels: None) -> None:
    w = CscTensor.from_dense(some(torch.randn(5, 4, dtype=F64)))
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    values = w.inner_values.clone().requires_grad_()
    with sl.fallback("error"):

        def product(values: Tensor, x: Tensor) -> Tensor:
            from sparse_layouts.layout_autograd import with_values

            return with_values(w, values) @ x

        assert torch.autograd.gradcheck(product, (values, x))


def test_a_result_in_the_users_layout(kernels: None, assert_close: Check) -> None:
    a, b = (CscTensor.from_dense(some(torch.randn(6, 6, dtype=F64))) for _ in range(2))
    with sl.fallback("error"):
        product = a * b
    assert type(product) is CscTensor
    assert_close(product, a.to_dense() * b.to_dense())


def test_a_layout_without_kernels_warns_once_a_call_site(assert_close: Check) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            found = run_graph(sparse=True)
    ours = [w for w in seen if issubclass(w.category, sl.DenseFallbackWarning)]
    assert len(ours) == len(seen) == 1, [str(w.message) for w in seen]
    assert "torch.mm has no sparse implementation for input=CscTensor" in str(ours[0].message)
    assert ours[0].filename == __file__
    assert [type(t) for t in found] == [Tensor, CscTensor, CscTensor, Tensor]
    for actual, expected in zip(found, run_graph(sparse=False), strict=True):
        assert_close(as_dense(actual), expected)


def test_a_layout_without_kernels_raises_with_the_stub_to_paste() -> None:
    w, x = CscTensor.from_dense(torch.eye(4)), torch.ones(4, 2)
    with sl.fallback("error"):
        with pytest.raises(sl.DenseFallbackError) as error:
            torch.mm(w, x)
        text = str(error.value)
        stub = text[text.index("    @sl.route") :].split("\nDensifying")[0]
        assert "@sl.route(torch.mm, input=CscTensor)" in stub
        names: dict[str, object] = {"sl": sl, "torch": torch, "CscTensor": CscTensor}
        code = "if True:\n" + stub.replace("...", "return input.to_dense() @ mat2  #")
        exec(code, names)  # as somebody pastes it, with a line of their own
        made = names["my_mm"]
        try:
            assert torch.equal(torch.mm(w, x), x)
        finally:
            made.unregister()
        with pytest.raises(sl.DenseFallbackError):
            torch.mm(w, x)
