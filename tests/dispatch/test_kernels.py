"""The table of kernels: registration, requirements, choice by name, errors that stay errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch import Facts, choose, facts_of, kernels_of, register_kernel
from sparse_layouts.dispatch.kernel_table import KERNELS, unregister_kernel

X = torch.ones(8, 2)
CPU = Facts("cpu", torch.float32)


@pytest.fixture
def w() -> sl.BSRTensor:
    return sl.bsr(torch.eye(8), block_size=4)


@pytest.fixture
def made_up_op() -> Iterator[str]:
    """An op with two kernels: one for float64, one for the CPU."""
    op = "made_up"
    register_kernel(
        op, "special", "nowhere:at_all", lambda f: None if f.dtype == torch.float64 else "only f64"
    )
    register_kernel(
        op, "general", lambda: "ran", lambda f: None if f.device == "cpu" else "only cpu"
    )
    yield op
    KERNELS.rows.pop(op)
    KERNELS.chosen.clear()


def test_the_first_kernel_whose_requirements_hold(made_up_op: str) -> None:
    assert choose(made_up_op, CPU).name == "general"
    assert choose(made_up_op, CPU._replace(dtype=torch.float64)).name == "special"
    assert choose(made_up_op, CPU._replace(device="mps")) is None
    first = register_kernel(made_up_op, "newest", lambda: None, first=True)
    assert [k.name for k in kernels_of(made_up_op)] == ["newest", "special", "general"]
    assert choose(made_up_op, CPU) is first
    unregister_kernel(first)
    assert choose(made_up_op, CPU).name == "general"


def test_a_name_taken_names_both_places(made_up_op: str) -> None:
    with pytest.raises(ValueError, match="registered twice") as error:
        register_kernel(made_up_op, "special", "other:place")
    assert str(error.value).count("test_kernels.py:") == 2
    assert [k.name for k in kernels_of(made_up_op)] == ["special", "general"]


def test_an_implementation_is_imported_when_it_is_first_run(made_up_op: str) -> None:
    special, general = kernels_of(made_up_op)
    assert special.source == "nowhere:at_all"
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        _ = special.function
    assert general.function() == "ran"
    assert "test_kernels" in general.source


def test_unknown_ops() -> None:
    with pytest.raises(ValueError, match=r"no op 'cooking'; there are .*block_matmul"):
        kernels_of("cooking")
    with pytest.raises(ValueError, match=r"no op 'cooking'; there are .*block_matmul"):
        sl.kernel("cooking")(lambda: None)


def test_facts(w: sl.BSRTensor) -> None:
    facts = facts_of(torch.ones(1, dtype=torch.float16), block_size=(4, 8), head_dim=3)
    assert facts[:3] == ("cpu", torch.float16, (0, 0))
    assert facts.block_size == (4, 8)
    assert facts.head_dim == 3
    assert hash(facts) == hash(facts_of(torch.zeros(2).half(), block_size=(4, 8), head_dim=3))


# --- @sl.kernel -----------------------------------------------------------------------------------


def sevens(
    values: Tensor, pattern: object, x: Tensor, *, transposed_output: bool = False
) -> Tensor:
    return x.new_full((x.shape[0], x.shape[1], pattern.shape[0], x.shape[-1]), 7.0)


@pytest.fixture
def own_kernel() -> Iterator[Callable[..., Tensor]]:
    """A kernel of block_matmul for float32 whose results are recognised."""

    @sl.kernel(
        "block_matmul", requires=lambda f: None if f.dtype == torch.float32 else "float32 only"
    )
    def my_kernel(
        values: Tensor, pattern: object, x: Tensor, *, transposed_output: bool = False
    ) -> Tensor:
        return sevens(values, pattern, x)

    yield my_kernel
    my_kernel.unregister()


def test_a_users_kernel_comes_first(w: sl.BSRTensor, own_kernel: Callable[..., Tensor]) -> None:
    assert bool((w @ X == 7).all())
    assert torch.equal(w.double() @ X.double(), X.double())  # its requirement does not hold
    own_kernel.unregister()
    assert torch.equal(w @ X, X)
    own_kernel.unregister()  # a second time does nothing


def test_a_users_kernel_by_another_name(w: sl.BSRTensor) -> None:
    made = sl.kernel("block_matmul", name="sevens")(sevens)
    try:
        assert kernels_of("block_matmul")[0].name == "sevens"
        with pytest.raises(ValueError, match="'sevens' of 'block_matmul' is registered twice"):
            sl.kernel("block_matmul", name="sevens")(lambda: None)
    finally:
        made.unregister()


def test_explain_gives_the_reason(w: sl.BSRTensor, own_kernel: Callable[..., Tensor]) -> None:
    assert sl.explain(torch.matmul, w, X).kernel == "my_kernel"
    double = sl.explain(torch.matmul, w.double(), X.double())
    assert double.kernel == "cpu"
    assert "float32 only" in repr(double)


def test_a_kernel_that_raises_is_an_error(w: sl.BSRTensor) -> None:
    @sl.kernel("block_matmul")
    def broken(*args: object, **options: object) -> Tensor:
        raise ZeroDivisionError("on purpose")

    try:
        for policy in ("warn", "allow"):
            with sl.fallback(policy), pytest.raises(ZeroDivisionError, match="on purpose"):
                w @ X
    finally:
        broken.unregister()
    assert torch.equal(w @ X, X)


# --- kernel_choice --------------------------------------------------------------------------------


def test_choice_by_name(w: sl.BSRTensor, own_kernel: Callable[..., Tensor]) -> None:
    with sl.kernel_choice(block_matmul="cpu"):
        assert torch.equal(w @ X, X)
        with sl.kernel_choice(op="block_matmul", kernel="my_kernel"):
            assert bool((w @ X == 7).all())
        assert torch.equal(w @ X, X)
    assert bool((w @ X == 7).all())


def test_a_choice_that_cannot_take_the_call_raises(w: sl.BSRTensor) -> None:
    with (
        sl.kernel_choice(block_matmul="triton"),
        sl.fallback("allow"),
        pytest.raises(
            NotImplementedError, match=r"'triton' that was asked for cannot: works on cuda"
        ),
    ):
        w @ X


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_matmul": "cuda"}, r"'block_matmul' has no kernel 'cuda'; it has .*cpu"),
        ({"cooking": "cpu"}, "no op 'cooking'"),
        ({"op": "block_matmul"}, "op= and kernel= go together"),
        ({"kernel": "cpu"}, "op= and kernel= go together"),
    ],
)
def test_wrong_choices(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sl.kernel_choice(**options)


def test_a_choice_reaches_the_backward(w: sl.BSRTensor) -> None:
    x = X.clone().requires_grad_()
    with sl.kernel_choice(block_matmul="cpu"), sl.trace() as steps:
        out = w @ x
        made = sl.kernel("block_matmul", name="sevens")(sevens)
    try:
        out.sum().backward()  # outside the block: what held in the forward holds
    finally:
        made.unregister()
    assert torch.equal(x.grad, torch.ones(8, 2))
    assert [s.kernel for s in steps] == ["cpu", "cpu"]
