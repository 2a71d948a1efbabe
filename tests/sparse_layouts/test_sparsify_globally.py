"""`sl.sparsify_globally`: one choice over several tensors."""

from __future__ import annotations

import builtins
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from tests.sparse_layouts.sparsifier_cases import ALL, largest, numbers, seeded, size_of


def weights() -> dict[str, Tensor]:
    """Of several sizes, dtypes and strides, with equal magnitudes in all of them."""
    return {
        "a": numbers(12, 16),
        "b": numbers(16, 12, dtype=torch.float64).mT * 2,
        "c": numbers(2, 24, 8, dtype=torch.bfloat16),
        "d": numbers(12, 16, dtype=torch.int8),
        "none": torch.zeros(0, 16),
    }


def together(tensors: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    parts = chosen.split([t.numel() for t in tensors.values()])
    return {name: p.view(tensors[name].shape) for name, p in zip(tensors, parts, strict=True)}


@pytest.mark.parametrize("density", [0.0, 0.01, 0.4, 1.0])
def test_magnitudes_are_ranked_over_all(density: float) -> None:
    tensors = weights()
    flat = torch.cat([size_of(t).flatten() for t in tensors.values()])
    expected = together(tensors, largest(flat, round(density * flat.numel())))
    made = sl.sparsify_globally(tensors, sl.Magnitude(density))
    assert list(made) == list(tensors)
    for name, kept in made.items():
        assert kept.dtype == torch.bool
        assert torch.equal(kept, expected[name]), name


def test_many_chunks_are_ranked_over_all() -> None:
    tensors = [torch.randn(300, 1000), torch.randn(1000, 300) * 0.1, torch.randn(500, 500) * 3]
    tensors[1][:10] = tensors[2][:10, :300]
    made = sl.sparsify_globally(tensors, sl.Magnitude(0.2))
    flat = torch.cat([t.abs().flatten() for t in tensors])
    least = flat.sort(descending=True).values[170_000 - 1]
    assert sum(int(kept.sum()) for kept in made) == 170_000
    for tensor, kept in zip(tensors, made, strict=True):
        assert tensor[kept].abs().min() >= least
        assert tensor[~kept].abs().max() <= least


@pytest.mark.parametrize("norm", [2, 1])
def test_blocks_are_ranked_over_all(norm: int) -> None:
    tensors = {name: t for name, t in weights().items() if name != "none"}
    norms = torch.cat(
        [
            torch.linalg.vector_norm(
                size_of(t).unflatten(-1, (-1, 4)).unflatten(-3, (-1, 3)), norm, dim=(-3, -1)
            ).flatten()
            for t in tensors.values()
        ]
    )
    if norm == 1:
        keep, option = sl.Blockwise(sl.Magnitude(0.3), (3, 4), norm=1), {}
    else:
        keep, option = sl.Magnitude(0.3), {"block_size": (3, 4)}
    count = round(0.3 * norms.numel())
    made = sl.sparsify_globally(tensors, keep, layout=sl.bsr, **{"block_size": (3, 4), **option})
    masks = sl.sparsify_globally(tensors, keep, **option)
    assert sum(w.nnz for w in made.values()) == 12 * count
    least = norms.sort(descending=True).values[count - 1]
    for name, tensor in tensors.items():
        assert torch.equal(made[name].to_dense(), tensor.where(masks[name], 0))
        blocks = masks[name].unflatten(-1, (-1, 4)).unflatten(-3, (-1, 3))
        assert torch.equal(blocks.any(-1).any(-2), blocks.all(-1).all(-2))
        kept = torch.linalg.vector_norm(
            size_of(made[name].values()), norm, dim=(-2, -1)
        )  # a norm in float32 may round either way
        assert (kept >= least * (1 - 4 * torch.finfo(torch.float32).eps)).all()


def test_random_keeps_an_exact_count_over_all() -> None:
    tensors = weights()
    made = sl.sparsify_globally(tensors, seeded(0.3))
    number = sum(t.numel() for t in tensors.values())
    assert sum(int(kept.sum()) for kept in made.values()) == round(0.3 * number)
    again = sl.sparsify_globally(tensors, seeded(0.3))
    assert all(torch.equal(made[name], again[name]) for name in tensors)
    assert not torch.equal(made["a"], made["d"])


@pytest.mark.parametrize("name", [n for n in ALL if "magnitude" not in n and "random" not in n])
def test_others_choose_for_each_by_itself(name: str) -> None:
    tensors = [numbers(3, 12, 16), numbers(3, 12, 16)]
    for tensor, kept in zip(tensors, sl.sparsify_globally(tensors, ALL[name]()), strict=True):
        torch.manual_seed(1)
        assert kept.shape == tensor.shape
    torch.manual_seed(1)
    sparsifier = ALL[name]()
    made = sl.sparsify_globally(tensors, sparsifier)
    assert all(torch.equal(k, sparsifier.keep(t)) for k, t in zip(made, tensors, strict=True))


class Mean:
    def choose(self, magnitudes: Tensor) -> Tensor:
        assert magnitudes.dim() == 1
        return magnitudes > magnitudes.mean()


def test_ones_own_sparsifier_gets_all_in_one_vector() -> None:
    small, large = torch.full((4, 4), 0.1), torch.full((2, 4), 7.0)
    made = sl.sparsify_globally((small, large), Mean())
    assert isinstance(made, tuple)
    assert [int(kept.sum()) for kept in made] == [0, 8]


def test_a_module_gives_its_matrices() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    made = sl.sparsify_globally(model, sl.Magnitude(0.25), layout=sl.bsr, block_size=4)
    assert list(made) == ["0.weight", "1.weight"]
    assert sum(w.nnz for w in made.values()) == 64
    one = sl.sparsify_globally(model, sl.KeepAll(), where=lambda name, p: name == "1.bias")
    assert list(one) == ["1.bias"]
    some = sl.sparsify_globally(weights(), sl.KeepAll(), where=lambda name, t: t.dim() == 3)
    assert list(some) == ["c"]


def test_gradients_reach_the_dense_tensors() -> None:
    dense = [torch.randn(8, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)]
    made = sl.sparsify_globally(dense, sl.Magnitude(0.5), layout=sl.bsr, block_size=4)
    assert all(type(w) is sl.BSRTensor and w.requires_grad for w in made)
    sum((w * 3).sum() for w in made).backward()
    for x, w in zip(dense, made, strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad, 3.0 * (w.detach().to_dense() != 0))
    masks = sl.sparsify_globally(dense, sl.Magnitude(0.5))
    assert not any(mask.requires_grad for mask in masks)


def test_results_have_the_structure_of_the_arguments() -> None:
    tensors = [numbers(4, 4), numbers(4, 4)]
    assert type(sl.sparsify_globally(tensors, sl.KeepAll())) is list
    assert type(sl.sparsify_globally(tuple(tensors), sl.KeepAll())) is tuple
    assert type(sl.sparsify_globally(iter(tensors), sl.KeepAll())) is list
    assert sl.sparsify_globally({}, sl.Magnitude(0.5)) == {}
    assert sl.sparsify_globally([], sl.Random(0.5), layout=sl.bsr, block_size=2) == []


@pytest.mark.parametrize("keep", [sl.Magnitude(0.5), sl.Threshold(0.5), sl.Random(0.5)], ids=repr)
@pytest.mark.parametrize("block_size", [None, 4])
def test_the_bar_ends_where_it_said(
    keep: sl.Sparsifier, block_size: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = [torch.randn(8, 32), torch.randn(64, 32).double()]
    made = sl.sparsify_globally(tensors, keep, block_size=block_size, progress=True)
    assert len(made) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "sparsify: 100%" in said.err.replace("\r", "\n").splitlines()[-1]
    sl.sparsify_globally(tensors, keep)
    assert capsys.readouterr().err == ""


def test_a_bar_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without_tqdm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "tqdm":
            raise ModuleNotFoundError("No module named 'tqdm'")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert len(sl.sparsify_globally([torch.ones(2, 2)], sl.KeepAll())) == 1
    with pytest.raises(ImportError, match=r"tqdm: pip install 'sparse_layouts\[cli\]'"):
        sl.sparsify_globally([torch.ones(2, 2)], sl.KeepAll(), progress=True)


def with_nan() -> dict[str, Tensor]:
    tensors = weights()
    tensors["c"][1, 3, 4] = math.nan
    return tensors


BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "nan": (
        lambda: sl.sparsify_globally(with_nan(), sl.Magnitude(0.5)),
        ValueError,
        r"sparsify_globally: NaN in c\. Magnitude: expected numbers.*nan_to_num",
    ),
    "nan in blocks": (
        lambda: sl.sparsify_globally(
            {"w": torch.full((4, 4), math.nan)}, sl.Threshold(1), block_size=2
        ),
        ValueError,
        r"NaN in w\. ",
    ),
    "block": (
        lambda: sl.sparsify_globally({"w": torch.zeros(4, 6)}, sl.Magnitude(0.5), block_size=4),
        ValueError,
        r"sparsify_globally: w: the block \(4, 4\) does not divide the matrix \(4, 6\)",
    ),
    "group": (
        lambda: sl.sparsify_globally({"w": torch.zeros(4, 6)}, sl.NM(2, 4)),
        ValueError,
        "sparsify_globally: NM: m=4 does not divide",
    ),
    "one tensor": (
        lambda: sl.sparsify_globally(torch.zeros(4, 6), sl.NM(2, 4)),
        TypeError,
        "expected several tensors, got one",
    ),
    "a number": (
        lambda: sl.sparsify_globally(3, sl.NM(2, 4)),  # type: ignore[arg-type]
        TypeError,
        "a module, a dict or an iterable of tensors, got int",
    ),
    "no tensors": (
        lambda: sl.sparsify_globally({"w": 3.0}, sl.NM(2, 4)),  # type: ignore[dict-item]
        TypeError,
        "sparsify_globally: w: expected a dense tensor, got float",
    ),
    "a layout": (
        lambda: sl.sparsify_globally([sl.bsr(torch.eye(4), 2)], sl.Magnitude(0.5)),
        TypeError,
        r"tensor 0: expected a dense tensor, got BSRTensor.*w\.to_dense\(\)",
    ),
    "a mask": (
        lambda: sl.sparsify_globally([torch.eye(4) > 0], sl.Magnitude(0.5)),
        TypeError,
        "tensor 0: expected numbers, got a bool tensor",
    ),
    "no sparsifier": (
        lambda: sl.sparsify_globally([torch.eye(4)], 0.5),
        TypeError,
        r"sparsifier is a sparsifier such as sl\.Magnitude.*got 0\.5",
    ),
    "where of a list": (
        lambda: sl.sparsify_globally([torch.eye(4)], sl.KeepAll(), where=lambda name, t: True),
        TypeError,
        "where picks by name, expected a module or a dict with it, got list",
    ),
    "block size": (
        lambda: sl.sparsify_globally([torch.eye(4)], sl.KeepAll(), block_size=0),
        ValueError,
        "sparsify_globally: block_size must be positive",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    call, error, match = BAD_CALLS[name]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("keep", [sl.Magnitude(0.2), sl.Blockwise(sl.Magnitude(0.2), 4)], ids=repr)
def test_a_layout_of_entries(keep: sl.Sparsifier) -> None:
    dense = {"a": torch.randn(12, 16, requires_grad=True), "b": torch.randn(8, 8) * 2}
    made = sl.sparsify_globally(dense, keep, layout=sl.csr)
    masks = sl.sparsify_globally(dense, keep)
    assert sum(int(mask.sum()) for mask in masks.values()) in (51, 16 * 3)
    for name, w in made.items():
        assert type(w) is sl.CSRTensor
        assert w.requires_grad == (name == "a")
        assert torch.equal(w.detach().to_dense(), dense[name].where(masks[name], 0))


def test_a_factory_with_arguments_of_its_own() -> None:
    keep = sl.Blockwise(sl.Magnitude(0.5), 4)
    layout = functools.partial(sl.bsr, block_size=2)
    (made,) = sl.sparsify_globally([torch.randn(8, 8)], keep, layout=layout)
    assert made.block_size == (2, 2)
    assert made.nnz == 32
