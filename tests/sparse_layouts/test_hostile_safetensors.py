"""safetensors files that lie, are cut off or broken: refused, with the layout and the field."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from tests.sparse_layouts.file_cases import assert_same, facts

pytest.importorskip("safetensors", reason="needs the extra safetensors")

import safetensors.torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


Edit = Callable[[dict[str, Any]], None]


def rewritten(
    path: Path, records: Callable[[dict[str, Any]], object], tensors: dict[str, Tensor]
) -> None:
    """Writes a file again with other records (text, or what becomes JSON) and tensors."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        kept = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    made = json.loads(metadata["sparse_layouts"])
    text = records(made)
    metadata["sparse_layouts"] = text if isinstance(text, str) else json.dumps(made)
    safetensors.torch.save_file({**kept, **tensors}, path, metadata)


def edit(*keys: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """Records in which the entry at `keys` is another; without it for `to=...`."""

    def apply(records: dict[str, Any]) -> None:
        place: Any = records
        for key in keys[:-1]:
            place = place[key]
        if to is ...:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to

    return apply


def layout_edit(*keys: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    return edit("layouts", "w", *keys, to=to)


AT = "layout 'w': "
DEEP = '{"a":' * 10**5
RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no JSON": (lambda r: "{", "metadata 'sparse_layouts': expected JSON, got: "),
    "deep": (lambda r: DEEP, "metadata 'sparse_layouts': expected JSON, got: "),
    "list": (lambda r: "[]", "expected version 1 of this format, got 'list'"),
    "version": (edit("version", to=2), "expected version 1 of this format, got 2; a newer"),
    "no names": (edit("names", to=...), "names: expected a list, got NoneType"),
    "layouts": (edit("layouts", to=[]), "layouts: expected a dict, got list"),
    "aliases": (edit("aliases", to=3), "aliases: expected a dict, got int"),
    "a name twice": (edit("names", to=["w", "w", "b", "c"]), "names: .*each once, got 'w'"),
    "a number as name": (edit("names", to=[1]), "names: expected texts, each once, got 1"),
    "a list as name": (edit("names", to=[["w"]]), r"names: .* got \['w'\]"),
    "absent name": (edit("names", 0, to="x"), "'x': expected one of .* got 0 of them"),
    "two things": (edit("aliases", "w", to="b"), "'w': expected one of .* got 2 of them"),
    "inner name": (edit("names", 0, to="w.values"), r"'w\.values': expected one of .* got 0"),
    "unlisted layout": (edit("names", to=["b", "c"]), "'w': expected a name that `names` lists"),
    "absent alias": (edit("aliases", "c", to="x"), "alias 'c': expected the name .* got 'x'"),
    "alias number": (edit("aliases", "c", to=3), "alias 'c': expected the name .* got 3"),
    "record": (edit("layouts", "w", to=3), AT + "expected an object with class, .* got 3"),
    "no class": (layout_edit("class", to=...), AT + "expected class, .*, got class missing"),
    "more": (layout_edit("code", to="x"), AT + "expected class, .*, got also code"),
    "class": (
        layout_edit("class", to="os.system"),
        AT + "class: .*got 'os.system'. Import the module that defines it first",
    ),
    "base class": (layout_edit("class", to="sparse_layouts.LayoutTensor"), AT + "class: expected"),
    "class number": (layout_edit("class", to=3), AT + "class: expected .*got 3"),
    "other class": (
        layout_edit("class", to="sparse_layouts.LocalStrideTensor"),
        AT + "static fields of LocalStrideTensor: expected .*, got head_offset, .*missing",
    ),
    "shape text": (layout_edit("shape", to="24"), AT + "shape: expected a list of sizes"),
    "shape negative": (layout_edit("shape", to=[-24, 40]), AT + "shape: .*sizes from 0"),
    "shape bool": (layout_edit("shape", to=[True, 40]), AT + "shape: expected a list of sizes"),
    "shape empty": (layout_edit("shape", to=[]), AT + r"shape: expected at least \(M, N\)"),
    "shape overflow": (
        layout_edit("shape", to=[2**62, 2**62]),
        AT + r"shape: expected fewer than 2\*\*63 entries",
    ),
    "shape huge": (layout_edit("shape", to=[2**31, 2**31]), AT + "crow_indices: expected"),
    "shape wide": (layout_edit("shape", to=[24, 2**40]), AT + "ccol_indices: expected"),
    "shape batch": (
        layout_edit("shape", to=[10**9, 24, 40]),
        AT + r"shape: expected \(24, 40\), which the fields make, got \(1000000000, 24, 40\)",
    ),
    "dtype": (layout_edit("dtype", to="float33"), AT + "dtype: .*name of a torch dtype.*float33"),
    "dtype module": (layout_edit("dtype", to="onnx"), AT + "dtype: expected the name of a torch"),
    "dtype number": (layout_edit("dtype", to=3), AT + "dtype: expected the name of a torch dtype"),
    "dtype other": (
        layout_edit("dtype", to="float32"),
        AT + r"dtype: expected that of field 'values', torch\.float64, got torch\.float32",
    ),
    "fields": (layout_edit("fields", to=[]), AT + "fields of BSRTensor: expected an object with"),
    "field missing": (
        layout_edit("fields", "col_indices", to=...),
        AT + "fields of BSRTensor: expected .*, got col_indices missing",
    ),
    "field unknown": (layout_edit("fields", "extra", to=None), AT + ".*got also extra"),
    "field absent": (
        layout_edit("fields", "col_indices", "key", to="w.nothing"),
        AT + r"field 'col_indices': expected the name of a tensor of the file, got 'w\.nothing'",
    ),
    "field None": (
        layout_edit("fields", "col_indices", to=None),
        AT + "expected the fields of a BSRTensor, got what it cannot be made of",
    ),
    "no field": (
        layout_edit("fields", to=dict.fromkeys(sl.BSRTensor.fields)),
        AT + "fields: expected at least one tensor",
    ),
    "field dtype": (
        layout_edit("fields", "col_indices", "dtype", to="int64"),
        AT + r"field 'col_indices' \('w\.col_indices'\): expected dtype 'int64', got 'int32'",
    ),
    "field shape": (
        layout_edit("fields", "values", "shape", to=[1, 4, 8]),
        AT + r"field 'values' \('w\.values'\): expected shape \(1, 4, 8\), got",
    ),
    "field key": (layout_edit("fields", "values", "key", to=3), AT + "field 'values': .*got 3"),
    "swapped": (
        layout_edit(
            "fields",
            "crow_indices",
            to={"key": "w.values", "dtype": "float64", "shape": [18, 4, 8]},
        ),
        AT + r"crow_indices: expected int32, got torch\.float64",
    ),
    "static list": (layout_edit("static", to=[]), AT + "static fields of BSRTensor: expected an"),
    "static missing": (layout_edit("static", "lead_dims", to=...), AT + ".*lead_dims missing"),
    "static text": (
        layout_edit("static", "lead_dims", to="0"),
        AT + "static field 'lead_dims': expected int, got '0'",
    ),
    "static bool": (layout_edit("static", "lead_dims", to=False), AT + "static field 'lead_dims'"),
    "static float": (layout_edit("static", "lead_dims", to=0.0), AT + "static field 'lead_dims'"),
    "static null": (layout_edit("static", "lead_dims", to=None), AT + "static field 'lead_dims'"),
    "static object": (
        layout_edit("static", "lead_dims", to={"import": "os"}),
        AT + "static field 'lead_dims': expected a value, a list",
    ),
    "static dtype": (
        layout_edit("static", "lead_dims", to={"dtype": "nn"}),
        AT + "static field 'lead_dims': expected a value, a list",
    ),
    "block_size int": (
        layout_edit("static", "block_size", to=8),
        AT + r"static field 'block_size': expected tuple.*, got 8",
    ),
    "block_size triple": (layout_edit("static", "block_size", to=[4, 8, 1]), AT + ".*'block_size'"),
    "block_size text": (layout_edit("static", "block_size", to=["4", "8"]), AT + ".*'block_size'"),
    "block_size zero": (
        layout_edit("static", "block_size", to=[0, 8]),
        AT + r"static field 'block_size': expected positive sizes .*, got \(0, 8\)",
    ),
    "block_size negative": (layout_edit("static", "block_size", to=[4, -8]), AT + ".*'block_size'"),
    "block_size huge": (
        layout_edit("static", "block_size", to=[2**20, 2**20]),
        AT + "static field 'block_size': expected positive sizes of at most 67108864 entries",
    ),
    "block_size other": (layout_edit("static", "block_size", to=[8, 8]), AT + "crow_indices: exp"),
    "lead_dims": (
        layout_edit("static", "lead_dims", to=5),
        AT + r"static field 'lead_dims': expected 0 for shape \(24, 40\), got 5",
    ),
    "lead_dims negative": (layout_edit("static", "lead_dims", to=-3), AT + ".*'lead_dims'"),
    "lead_dims huge": (layout_edit("static", "lead_dims", to=10**30), AT + ".*'lead_dims'"),
}


@pytest.fixture
def saved(small: sl.BSRTensor, path: Path) -> Path:
    """`small` as "w", a tensor "b" of two float64, and "c", which is "b"."""
    b = torch.ones(2, dtype=torch.float64)
    sl.save_safetensors({"w": small, "b": b, "c": b}, path)
    return path


@pytest.mark.parametrize("name", RECORDS)
def test_bad_records(name: str, saved: Path) -> None:
    change, message = RECORDS[name]
    rewritten(saved, change, {})
    with pytest.raises(ValueError, match=rf"state\.safetensors: (?s:.*){message}"):
        sl.load_safetensors(saved)


def test_the_records_as_they_are_load(saved: Path, small: sl.BSRTensor) -> None:
    rewritten(saved, lambda r: None, {})
    assert_same(sl.load_safetensors(saved)["w"], small)


@pytest.mark.parametrize(
    "text",
    ['"version": 1, "version": 1', '"version": NaN', '"version": -Infinity', '"version": 1e'],
)
def test_bad_json(text: str, saved: Path) -> None:
    rewritten(saved, lambda r: json.dumps(r).replace('"version": 1', text, 1), {})
    with pytest.raises(ValueError, match="metadata 'sparse_layouts': expected JSON, got: "):
        sl.load_safetensors(saved)


def flat(tensor: Tensor, value: int, at: int) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[at] = value
    return changed


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), 1000])
def test_indices_out_of_range(value: int, at: int, block_layout: sl.BSRTensor, path: Path) -> None:
    sl.save_safetensors({"w": block_layout}, path)
    for field, tensor in zip(block_layout.fields, block_layout.inner_tensors(), strict=True):
        if field in ("values", "tiles", "block_counts") or tensor is None or not tensor.numel():
            continue
        sl.save_safetensors({"w": block_layout}, path)
        rewritten(path, lambda r: None, {f"w.{field}": flat(tensor, value, at)})
        with pytest.raises(ValueError, match=r"layout 'w': "):
            sl.load_safetensors(path)


@pytest.mark.parametrize("position", [0, -1])
def test_a_shape_that_lies(position: int, layout: sl.LayoutTensor, path: Path) -> None:
    """It is refused, or else, as a wider matrix with the same entries would be, no larger."""
    size = list(layout.shape)
    size[position] = 2**40
    sl.save_safetensors({"w": layout}, path)
    rewritten(path, layout_edit("shape", to=size), {})
    try:
        made = sl.load_safetensors(path)["w"]
    except ValueError as error:
        assert "layout 'w': " in str(error)  # noqa: PT017 - either is right
    else:
        assert not isinstance(made, sl.BSRTensor)
        assert made.nbytes == layout.nbytes


def test_a_dtype_that_was_converted(saved: Path, small: sl.BSRTensor) -> None:
    rewritten(saved, lambda r: None, {"w.values": small.values().detach().half()})
    with pytest.raises(
        ValueError, match=r"'values' \('w\.values'\): expected dtype 'float64', got"
    ):
        sl.load_safetensors(saved)


def test_static_types_follow_the_annotations(path: Path) -> None:
    sl.save_safetensors({"w": facts(torch.ones(2))}, path)
    for field, wrong in (("count", 1.0), ("scale", "x"), ("scale", True), ("label", 3)):
        rewritten(path, layout_edit("static", field, to=wrong), {})
        with pytest.raises(ValueError, match=f"layout 'w': static field '{field}': expected"):
            sl.load_safetensors(path)
        sl.save_safetensors({"w": facts(torch.ones(2))}, path)
    rewritten(path, layout_edit("static", "label", to="x"), {})
    rewritten(path, layout_edit("static", "scale", to=2), {})
    assert sl.load_safetensors(path)["w"].static()["label"] == "x"


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, -1, -64])
def test_a_file_that_is_cut_off(cut: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a safetensors file, got: "):
        sl.load_safetensors(saved)


def with_header(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FILES: dict[str, tuple[bytes, str]] = {
    "long header": (with_header(b"{}", b"", 2**62), "expected a safetensors file"),
    "short header": (with_header(b'{"a":' + ENTRY + b"}", b"\0" * 4, 5), "expected a safetensors"),
    "no JSON": (with_header(b"garbage!", b""), "expected a safetensors file"),
    "huge tensor": (
        with_header(b'{"a":' + ENTRY.replace(b"[1]", b"[1099511627776,1048576]") + b"}", b"\0" * 4),
        "expected a safetensors file",
    ),
    "twice": (
        with_header(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", b"\0" * 4),
        "header: expected JSON, got: the name 'a' is there twice",
    ),
    "metadata twice": (
        with_header(b'{"__metadata__":{"x":"1","x":"2"},"a":' + ENTRY + b"}", b"\0" * 4),
        "header: expected JSON, got: the name 'x' is there twice",
    ),
    "text": (b"hello, this is no safetensors file at all", "expected a safetensors file"),
    "pickle": (b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.", "expected a safetensors"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, path: Path) -> None:
    path.write_bytes(FILES[name][0])
    with pytest.raises(ValueError, match=r"state\.safetensors: " + FILES[name][1]):
        sl.load_safetensors(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file, got a directory"):
        sl.load_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        sl.load_safetensors(tmp_path / "absent")


def test_every_byte_of_the_header_may_be_wrong(saved: Path) -> None:
    """Whatever stands there: a state dict or a `ValueError`, and nothing else."""
    given = saved.read_bytes()
    length = int.from_bytes(given[:8], "little") + 8
    outcomes = collections.Counter()
    for at in range(0, length, 7):
        for byte in b'\0"9[x':
            saved.write_bytes(given[:at] + bytes([byte]) + given[at + 1 :])
            try:
                sl.load_safetensors(saved)
                outcomes["loaded"] += 1
            except ValueError as error:
                assert str(error).startswith(str(saved))  # noqa: PT017 - either is right
                outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["loaded"]


def test_a_class_of_another_module(path: Path) -> None:
    """It is refused until its module is imported, and loading does not import it."""
    code = """
import sys, torch, sparse_layouts as sl
class Mine(sl.LayoutTensor):
    fields = ("entries",)
    def to_dense(self):
        return torch.diag(self.inner_entries)
Mine.__module__, Mine.__qualname__ = "some_package.layouts", "Outer.Mine"
sl.save_safetensors({"w": Mine(torch.ones(3), shape=(3, 3))}, sys.argv[1])
print(sl.load_safetensors(sys.argv[1])["w"].to_dense().sum().item())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "3.0"), done.stderr
    with pytest.raises(ValueError, match=r"'some_package\.layouts\.Outer\.Mine'\. Import the mod"):
        sl.load_safetensors(path)
    assert "some_package" not in sys.modules


def test_a_class_that_is_defined_again_is_the_later_one(path: Path) -> None:
    def define() -> type[sl.LayoutTensor]:
        class Again(sl.LayoutTensor):
            fields = ("entries",)

        return Again

    first, second = define(), define()
    sl.save_safetensors({"w": first(torch.ones(3), shape=(3, 3))}, path)
    assert type(sl.load_safetensors(path)["w"]) is second
