"""safetensors files: what goes in comes out, and what is shared stays shared."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_layouts as sl
from tests.sparse_layouts.file_cases import assert_same, facts

pytest.importorskip("safetensors", reason="needs the extra safetensors")

import safetensors.torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


def through_file(state: dict[str, Tensor], path: Path, **options: Any) -> dict[str, Tensor]:
    sl.save_safetensors(state, path)
    return sl.load_safetensors(path, **options)


# --- round trips ----------------------------------------------------------------------------------


def test_every_layout(layout: sl.LayoutTensor, path: Path) -> None:
    again = through_file({"w": layout.requires_grad_()}, path)["w"]
    assert_same(again, layout)
    again.validate()
    assert torch.equal(again.to_dense(), layout.to_dense())
    again.fill_(2.0)  # the file is mapped, and yet not written to
    assert_same(sl.load_safetensors(path)["w"], layout)


def test_every_mask(mask: sl.LayoutTensor, path: Path) -> None:
    again = through_file({"mask": mask}, path)["mask"]
    assert_same(again, mask)
    assert torch.equal(again.to_dense(), mask.to_dense())
    assert repr(again) == repr(mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, small: sl.BSRTensor, path: Path) -> None:
    state = {"w": small.to(dtype), "b": torch.tensor([1.5, float("nan"), -0.0], dtype=dtype)}
    for name, tensor in through_file(state, path).items():
        assert_same(tensor, state[name])


def test_plain_tensors(path: Path) -> None:
    state = {
        "strided": torch.randn(6, 8).mT[:, ::2],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "expanded": torch.ones(1).expand(3),
        "parameter": nn.Parameter(torch.randn(3)),
        "view": torch.arange(10)[3:5],
    }
    again = through_file(state, path)
    assert list(again) == list(state)
    for name, tensor in again.items():
        assert_same(tensor, state[name])


def test_conjugates(path: Path) -> None:
    z = torch.tensor([1 + 2j])
    try:
        safetensors.torch.save({"z": z})
    except KeyError:
        pytest.skip(f"safetensors {safetensors.__version__} has no complex numbers")
    state = {"z": z, "conj": z.conj(), "real": z.real, "imag": z.imag, "minus": z.conj().imag}
    again = through_file(state, path)
    for name, tensor in again.items():
        assert_same(tensor, state[name].resolve_conj().resolve_neg())


def test_a_model(small: sl.BSRTensor, path: Path) -> None:
    def model(weight: Tensor) -> nn.Module:
        made = nn.Sequential(nn.Linear(40, 24), nn.BatchNorm1d(24))
        made[0].weight = nn.Parameter(weight)
        made.register_buffer("mask", sl.causal(30, block_size=8))
        return made.double()

    trained, fresh = model(small), model(torch.zeros_like(small))
    sl.save_safetensors(trained.state_dict(), path)
    loaded = sl.load_safetensors(path)
    assert list(loaded) == list(trained.state_dict())
    fresh.load_state_dict(loaded)
    assert isinstance(fresh[0].weight, nn.Parameter)
    assert fresh[0].weight.requires_grad
    for name, tensor in fresh.state_dict().items():
        assert_same(tensor.detach(), trained.state_dict()[name])


def test_meta_and_other_devices(small: sl.BSRTensor, path: Path) -> None:
    loaded = through_file({"w": small, "b": torch.ones(3)}, path, device="meta")
    assert type(loaded["w"]) is sl.BSRTensor
    assert {t.device.type for t in loaded.values()} == {"meta"}
    assert all(t is None or t.is_meta for t in loaded["w"].inner_tensors())


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        10**30,
        1.5,
        float("inf"),
        -0.0,
        "text 'with' \"quotes\" ☃",
        (),
        (1, (2.5, None, ("x", False))),
        torch.bfloat16,
        (torch.float32, float("-inf")),
    ],
    ids=repr,
)
def test_static_fields(value: object, path: Path) -> None:
    w = facts(torch.ones(3), facts=value)
    again = through_file({"w": w}, path)["w"].facts
    assert again == value
    assert repr(again) == repr(value)


def test_a_static_nan(path: Path) -> None:
    assert repr(through_file({"w": facts(torch.ones(2), scale=float("nan"))}, path)["w"].scale) == (
        "nan"
    )


def test_names_that_could_collide(small: sl.BSRTensor, path: Path) -> None:
    state = {
        "w": small,
        "w.values": torch.ones(3),
        "w.values_": small * 2,
        "w.crow_indices": facts(torch.ones(2)),
        "w.crow_indices.entries": torch.zeros(2),
        "": torch.ones(1),
        "w.values_.values": torch.ones(4),
        METADATA: torch.ones(1),
    }
    again = through_file(state, path)
    assert list(again) == list(state)
    for name, tensor in again.items():
        assert_same(tensor, state[name])


METADATA = "sparse_layouts"


def test_other_readers_see_the_tensors(small: sl.BSRTensor, path: Path) -> None:
    sl.save_safetensors({"w": small, "b": torch.ones(3)}, path, {"license": "mine"})
    plain = safetensors.torch.load_file(path)
    assert torch.equal(plain["w.values"], small.values())
    assert torch.equal(plain["w.col_indices"], small.col_indices())
    assert torch.equal(plain["b"], torch.ones(3))
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["license"] == "mine"
        assert file.metadata()["format"] == "pt"


def test_files_of_other_writers(path: Path) -> None:
    state = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    safetensors.torch.save_file(state, path, {"format": "pt"})
    again = sl.load_safetensors(path)
    assert set(again) == set(state)
    for name, tensor in again.items():
        assert_same(tensor, state[name])


def test_a_tensor_that_was_added_later_is_loaded_too(small: sl.BSRTensor, path: Path) -> None:
    sl.save_safetensors({"w": small}, path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "more": torch.ones(2)}, path, metadata)
    again = sl.load_safetensors(path)
    assert list(again) == ["w", "more"]
    assert_same(again["w"], small)


# --- what is shared -------------------------------------------------------------------------------


def tensors_of(*layouts: sl.LayoutTensor) -> list[Tensor]:
    return [t for w in layouts for t in w.inner_tensors() if t is not None]


def test_a_shared_pattern_is_stored_once(small: sl.BSRTensor, path: Path) -> None:
    state = {"a": small, "mask": small.pattern, "b": small * 2, "other": small.clone()}
    again = through_file(state, path)
    values = [again[name].inner_values for name in ("a", "b", "other")]
    assert len({t.data_ptr() for t in values}) == 3
    for name in ("mask", "b", "other"):
        pairs = zip(again[name].inner_tensors()[1:], again["a"].inner_tensors()[1:], strict=True)
        assert all(x is y for x, y in pairs)
    stored = sum(t.nbytes for t in safetensors.torch.load_file(path).values())
    assert stored == small.nbytes + 2 * small.values().nbytes


@pytest.mark.parametrize("make", [lambda: sl.bsr(torch.zeros(24, 40), (4, 8)), None])
def test_tied_weights_stay_tied(
    make: Callable[[], sl.BSRTensor] | None, small: sl.BSRTensor, path: Path
) -> None:
    layer = nn.Linear(40, 24, dtype=torch.float64)
    layer.weight = nn.Parameter(small if make is None else make())
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(2, 3)})
    again = through_file(model.state_dict(), path)
    assert list(again) == list(model.state_dict())
    assert again["a.bias"].data_ptr() == again["b.bias"].data_ptr()
    assert again["a.weight"] is not again["b.weight"]
    pairs = zip(tensors_of(again["a.weight"]), tensors_of(again["b.weight"]), strict=True)
    assert all(x.data_ptr() == y.data_ptr() for x, y in pairs)
    for name, tensor in model.state_dict().items():
        assert_same(again[name], tensor)
    again["a.bias"].fill_(3.0)
    assert bool((again["b.bias"] == 3.0).all())


def test_shared_with_a_plain_tensor(small: sl.BSRTensor, path: Path) -> None:
    state = {"values": small.values().detach(), "w": small}
    again = through_file(state, path)
    assert list(again) == ["values", "w"]
    assert again["values"].data_ptr() == again["w"].inner_values.data_ptr()
    assert set(safetensors.torch.load_file(path)) == {
        "w." + name for name in small.fields if getattr(small, "inner_" + name) is not None
    }


def test_shared_across_devices(small: sl.BSRTensor, path: Path) -> None:
    again = through_file({"a": small, "b": small * 2}, path, device="meta")
    assert again["a"].inner_col_indices is again["b"].inner_col_indices


def test_views_that_overlap(small: sl.BSRTensor, path: Path) -> None:
    base = torch.arange(12.0)
    state = {
        "all": base,
        "left": base[:6],
        "middle": base[4:8],
        "right": base[6:],
        "matrix": base.view(3, 4),
        "mT": base.view(3, 4).mT,
        "w": small,
        "flipped": small.mT,
    }
    again = through_file(state, path)
    for name in state:
        if name != "flipped":
            assert_same(again[name], state[name])
    assert torch.equal(again["flipped"].to_dense(), small.to_dense().mT)


def test_separate_parts_of_one_memory_are_not_copied(path: Path) -> None:
    from sparse_layouts.tensor_store import TensorStore

    base = torch.arange(12.0)
    store = TensorStore({"a", "b", "c"})
    for name, part in (("b", base[4:8]), ("a", base[:4]), ("c", base[7:])):
        store.add(part, name, name)
    packed = store.separate()
    assert packed["a"].data_ptr() == base.data_ptr()
    assert packed["b"].data_ptr() == base[4:].data_ptr()
    assert packed["c"].data_ptr() != base[7:].data_ptr()


def test_saving_over_the_file_that_was_loaded(small: sl.BSRTensor, path: Path) -> None:
    loaded = through_file({"w": small, "b": torch.ones(1000)}, path)
    sl.save_safetensors({"w": loaded["w"]}, path)
    assert torch.equal(loaded["b"], torch.ones(1000))
    assert_same(sl.load_safetensors(path)["w"], small)
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_save_leaves_the_old_file(path: Path) -> None:
    sl.save_safetensors({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"expected dtypes that safetensors .*complex128"):
        sl.save_safetensors({"a": torch.ones(2, dtype=torch.complex128)}, path)
    assert_same(sl.load_safetensors(path)["a"], torch.ones(2))
    assert os.listdir(path.parent) == [path.name]


# --- what cannot be saved -------------------------------------------------------------------------

W = sl.bsr(torch.eye(8), block_size=4)
UNSAVED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "list": ([W], {}, TypeError, r"mapping of names to tensors.*got list"),
    "name": ({3: W}, {}, TypeError, "names that are str, got int"),
    "reserved": ({"__metadata__": W}, {}, ValueError, "'__metadata__' is the format's own"),
    "number": ({"step": 3}, {}, TypeError, r"'step': .*got int; torch\.save stores"),
    "nested": ({"state": {"w": W}}, {}, TypeError, "'state': .*got dict"),
    "sparse": (
        {"s": torch.eye(2).to_sparse()},
        {},
        TypeError,
        r"'s': .*torch\.sparse_coo; sl\.bsr",
    ),
    "subclass": (
        {"s": torch.ones(2).as_subclass(type("Mine", (Tensor,), {}))},
        {},
        TypeError,
        "'s': expected a layout or a plain tensor, got Mine",
    ),
    "meta": ({"m": torch.ones(2, device="meta")}, {}, ValueError, "'m': .*meta device"),
    "meta layout": ({"w": W.to("meta")}, {}, ValueError, "'w', field 'values': .*meta device"),
    "static": (
        {"w": facts(torch.ones(2), facts=frozenset({1}))},
        {},
        TypeError,
        "'w': static field 'facts': expected None, bool, .*got frozenset",
    ),
    "metadata": ({}, {"metadata": {"a": 1}}, TypeError, "metadata is text by text, got str: int"),
    "our metadata": (
        {},
        {"metadata": {"sparse_layouts": ""}},
        ValueError,
        "entry 'sparse_layouts' holds the layouts; use another name",
    ),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_what_cannot_be_saved(name: str, path: Path) -> None:
    state, options, error, message = UNSAVED[name]
    with pytest.raises(error, match="save_safetensors: .*" + message):
        sl.save_safetensors(state, path, **options)
    assert not path.exists()


def test_without_the_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sl.save_safetensors({"w": W}, path)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: sl.save_safetensors({"w": W}, path), lambda: sl.load_safetensors(path)):
        with pytest.raises(
            ModuleNotFoundError, match=r"pip install 'sparse_layouts\[safetensors\]'"
        ):
            call()
