"""Every optimizer of torch.optim on every layout: ten steps equal those of the dense weight on the
stored entries; and what an optimizer may do that other code may not.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_layouts as sl

Check = Callable[..., None]
F64 = torch.float64

# Those that see a weight as a whole: LBFGS keeps flat dense directions, Adafactor a dense
# estimate of the squares (both say that they densify). Muon mixes entries, SparseAdam wants
# gradients that are sparse in torch's way.
DENSE_INSIDE = ("Adafactor", "LBFGS")
REFUSED = {"Muon": "mixes entries", "SparseAdam": "consider Adam instead"}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.1},
    "Adadelta": {"lr": 0.5},
    "LBFGS": {"lr": 0.1, "max_iter": 2},  # a line search would go another way by a rounding
}


def optimizers() -> list[str]:
    found = {name: getattr(torch.optim, name) for name in dir(torch.optim)}
    kinds = {n: c for n, c in found.items() if isinstance(c, type)}
    return [
        name
        for name, kind in kinds.items()
        if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    ]


def forms(name: str) -> dict[str, dict[str, bool]]:
    taken = inspect.signature(getattr(torch.optim, name)).parameters
    made: dict[str, dict[str, bool]] = {"plain": {"foreach": False} if "foreach" in taken else {}}
    made.update({form: {form: True} for form in ("foreach", "fused") if form in taken})
    return made


CASES = [(name, form) for name in optimizers() if name not in REFUSED for form in forms(name)]
PROMISED = ("SGD", "Adam", "AdamW")
# in every form on every layout, the others in one form
ON_EVERY_LAYOUT = [(name, form) for name, form in CASES if form == "plain" or name in PROMISED]


def make(name: str, form: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    options = {"lr": 0.01, **OPTIONS.get(name, {}), **forms(name)[form]}
    return getattr(torch.optim, name)(parameters, **options)


def quadratic(weight: Tensor) -> Tensor:
    """A loss whose gradient is the same on stored entries for a layout and its dense form."""
    return (weight * weight / 2 + weight * 3).sum()


def train(optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: int) -> int:
    """Returns how often the loss was computed."""
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = sum(quadratic(p) for p in parameters)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return calls


def stored_of(layout: sl.LayoutTensor) -> Tensor:
    return torch.ones(layout.shape, dtype=layout.dtype).sparse_mask(layout).to_dense()


@pytest.mark.contract("optimizers")
@pytest.mark.parametrize(("name", "form"), ON_EVERY_LAYOUT)
def test_ten_steps(name: str, form: str, one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    check_ten_steps(name, form, one_layout, assert_close)


@pytest.mark.parametrize(("name", "form"), [c for c in CASES if c not in ON_EVERY_LAYOUT])
def test_ten_steps_in_other_forms(
    name: str, form: str, small: sl.BSRTensor, assert_close: Check
) -> None:
    check_ten_steps(name, form, small, assert_close)


@pytest.mark.gpu
@pytest.mark.contract("optimizers")
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("form", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_ten_steps_on_a_gpu(
    name: str, form: str, capturable: bool, one_layout: sl.LayoutTensor, assert_close: Check
) -> None:
    found = []
    for device in ("cpu", "cuda"):
        weight = nn.Parameter(one_layout.clone().to(device))
        options = {"capturable": capturable and device == "cuda"}
        options |= {} if form == "plain" else {form: True}
        optimizer = getattr(torch.optim, name)([weight], lr=0.01, eps=0.1, **options)
        train(optimizer, [weight], 10)
        assert type(weight) is type(one_layout)
        weight.validate()
        found.append(weight.detach().cpu())
    # a captured step counts in float32: 1 - 0.999 ** step is off by its eps over 0.001
    single = torch.finfo(torch.float32).eps / torch.finfo(F64).eps / (1 - 0.999)
    scale = one_layout.to_dense().norm().item() * 10
    assert_close(found[1], found[0], scale=10 * 0.01 * single if capturable else scale)


def check_ten_steps(name: str, form: str, layout: sl.LayoutTensor, assert_close: Check) -> None:
    stored = stored_of(layout)
    dense = nn.Parameter(layout.to_dense().contiguous())
    sparse = nn.Parameter(layout.clone())
    dense.register_hook(lambda grad: grad * stored)
    for weight in (dense, sparse):
        # a dense matrix beside it: foreach and fused forms get a mixed list
        beside = nn.Parameter(torch.ones(3, 2, dtype=F64))
        policy = "allow" if name in DENSE_INSIDE else "error"
        with sl.fallback(policy):
            calls = train(make(name, form, [weight, beside]), [weight, beside], 10)
    assert isinstance(sparse, nn.Parameter)
    assert sparse.same_pattern(layout)
    sparse.validate()
    assert not torch.equal(sparse.detach().to_dense(), layout.to_dense())
    scale = max(dense.norm().item(), layout.to_dense().norm().item()) * calls  # each one rounds
    assert_close(sparse.detach(), dense.detach(), scale=scale)


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_say_why_not(name: str, small: sl.BSRTensor) -> None:
    weight = nn.Parameter(small)
    optimizer = getattr(torch.optim, name)([weight])
    quadratic(weight).backward()
    with sl.fallback("allow"), pytest.raises((TypeError, RuntimeError), match=REFUSED[name]):
        optimizer.step()


def test_every_refusal_is_of_an_optimizer_that_exists() -> None:
    assert set(REFUSED) | set(DENSE_INSIDE) | set(OPTIONS) <= set(optimizers())


@pytest.mark.contract("files")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Rprop", "LBFGS"])
def test_training_goes_on_from_a_file(name: str, one_layout: sl.LayoutTensor) -> None:
    weight = nn.Parameter(one_layout.clone())
    optimizer = make(name, "plain", [weight])
    with sl.fallback("allow"):
        train(optimizer, [weight], 3)
        file = io.BytesIO()
        torch.save([weight, optimizer.state_dict()], file)
        train(optimizer, [weight], 3)
        file.seek(0)
        again, state = torch.load(file, weights_only=True)
        other = make(name, "plain", [again])
        other.load_state_dict(state)
        train(other, [again], 3)
    assert isinstance(again, nn.Parameter)
    assert type(again) is type(weight)
    assert torch.equal(again.detach().to_dense(), weight.detach().to_dense())


@pytest.mark.contract("optimizers")
def test_averaged_weights(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    weight = nn.ParameterList([one_layout])
    averaged = torch.optim.swa_utils.AveragedModel(weight)
    start = weight[0].detach().to_dense()
    with sl.fallback("error"):
        for _ in range(3):
            averaged.update_parameters(weight)
            with torch.no_grad():
                weight[0].mul_(2.0)
    assert type(averaged.module[0]) is type(one_layout)
    assert_close(averaged.module[0].detach(), start * (1 + 2 + 4) / 3)


@pytest.mark.contract("optimizers")
def test_a_schedule_and_a_learning_rate_as_a_tensor(one_layout: sl.LayoutTensor) -> None:
    weight = nn.Parameter(one_layout)
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.1), foreach=False)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        train(optimizer, [weight], 1)
        schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    assert type(optimizer.state[weight]["exp_avg"]) is type(one_layout)


class OwnRule(torch.optim.Optimizer):
    """A user's own optimizer: out of place, as it would be written for dense tensors."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            scale = parameter.grad.square().add(0.5).rsqrt()
            parameter.add_(torch.where(scale > 1, scale, scale.exp()) * parameter.grad, alpha=-0.1)


@pytest.mark.contract("optimizers")
def test_an_optimizer_of_ones_own(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    dense, sparse = nn.Parameter(one_layout.to_dense()), nn.Parameter(one_layout)
    stored = stored_of(one_layout)
    for weight in (dense, sparse):
        quadratic(weight).backward()
        if weight is dense:
            weight.grad.mul_(stored)
        with sl.fallback("error"):
            OwnRule([weight]).step()
    assert_close(sparse.detach(), dense.detach())


# --- other code -----------------------------------------------------------------------------------


def test_a_closure_is_other_code(small: sl.BSRTensor) -> None:
    weight = nn.Parameter(small)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    seen = []

    def closure() -> Tensor:
        with sl.fallback("allow"):
            seen.append(weight.detach() + 1)
        return torch.zeros(())

    optimizer.step(closure)
    assert type(seen[0]) is Tensor
    assert (seen[0] == 1).any()


def test_a_dense_update_may_not_drop_entries(small: sl.BSRTensor) -> None:
    class Adds(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(self.update)

    weight = nn.Parameter(small.clone())
    optimizer = Adds([weight], {})
    optimizer.update = small.to_dense()
    optimizer.step()
    assert torch.equal(weight.detach().to_dense(), small.to_dense() * 2)
    optimizer.update = torch.ones(24, 40, dtype=F64)
    with pytest.raises(TypeError, match=r"not 0 at entries(.|\n)*AdamW"):
        optimizer.step()
    with torch.no_grad(), pytest.raises(TypeError, match="sparse_mask"):
        weight.add_(small.to_dense())  # not an optimizer's


def test_what_is_dense_inside_says_so(small: sl.BSRTensor) -> None:
    for name in DENSE_INSIDE:
        weight = nn.Parameter(small.clone())
        with pytest.warns(sl.DenseFallbackWarning):
            train(make(name, "plain", [weight]), [weight], 1)


def test_copies_of_an_optimizer(small: sl.BSRTensor) -> None:
    model = nn.ParameterList([small])
    optimizer = torch.optim.Adam(model.parameters())
    train(optimizer, list(model), 1)
    again, copied = copy.deepcopy((model, optimizer))
    assert copied.param_groups[0]["params"][0] is again[0]
    train(copied, list(again), 1)
    train(optimizer, list(model), 1)
    assert torch.equal(again[0].detach().to_dense(), model[0].detach().to_dense())
