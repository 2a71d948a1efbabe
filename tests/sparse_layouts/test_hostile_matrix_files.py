"""`.smtx` and MatrixMarket files, cut off, lying or garbage: refused, naming line and field."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparse_layouts as sl
from tests.sparse_layouts.stand_ins import power_law, write_smtx

SMALL = "3, 4, 4\n0 2 2 4\n0 3 1 2\n"
HEAD = "%%MatrixMarket matrix coordinate real general\n"

BILLION = "1000000000"

BAD_SMTX: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"line 1: expected 'rows, cols, nnz', got nothing"),
    "words": ("rows, cols, nnz\n", r"line 1: rows: expected a whole number from 0, got 'rows'"),
    "two counts": ("3, 4\n0\n", r"line 1: expected 'rows, cols, nnz', got '3, 4'"),
    "four counts": ("3, 4, 5, 6\n0\n", r"line 1: expected 'rows, cols, nnz', got '3, 4, 5, 6'"),
    "negative rows": ("-3, 4, 4\n0\n", r"line 1: rows: expected a whole number from 0, got '-3'"),
    "negative nnz": ("3, 4, -4\n0\n", r"line 1: nnz: expected a whole number from 0, got '-4'"),
    "fraction": ("3, 4.0, 4\n0\n", r"line 1: cols: expected a whole number from 0, got '4\.0'"),
    "over int32": ("3, 2147483648, 4\n0\n", r"line 1: cols: expected at most 2147483647"),
    "over int64": (f"3, 4, {10**30}\n0\n", r"line 1: nnz: expected at most 2147483647"),
    "many digits": ("1" * 60000 + ", 1, 1\n0\n", r"line 1: rows: expected at most 2147483647"),
    "more than there is room": ("3, 4, 13\n0\n", r"line 1: nnz: expected at most 3 \* 4 entries"),
    "huge nnz": (
        f"100000, 100000, {BILLION}\n0 2 2 4\n0 3 1 2\n",
        r"line 1: rows and nnz: expected 2000200001 to \d+ bytes .* got 16: the file is cut off",
    ),
    "huge rows": (f"{BILLION}, 4, 4\n0 2 2 4\n0 3 1 2\n", r"line 1: rows and nnz: .* cut off"),
    "huge body": (
        "3, 4, 4\n0 2 2 4\n" + "1 " * 10**6,
        r"line 1: rows and nnz: expected 15 to 65792 bytes .* got 2000008",
    ),
    "cut in line 1": ("3, 4", r"line 1: expected 'rows, cols, nnz', got '3, 4'"),
    "cut in line 2": ("3, 4, 4\n0 2", r"line 1: rows and nnz: .* the file is cut off"),
    "cut in line 3": (
        SMALL.replace("0 3 1 2", "0 3 001"),
        r"line 3: column indices: expected 4 numbers, got 3",
    ),
    "short pointers": (
        SMALL.replace("0 2 2 4", "0 2 4  "),
        r"line 2: row pointers: expected 4 numbers, got 3",
    ),
    "long pointers": (SMALL.replace("0 2 2 4", "0 2 2 4 4"), r"line 2: .* 4 numbers, got 5"),
    "blank pointers": ("3, 4, 4\n" + " " * 40 + "\n0 3 1 2\n", r"line 2: .* 4 numbers, got 0"),
    "long indices": (SMALL[:-1] + " 3\n", r"line 3: column indices: expected 4 numbers, got 5"),
    "more lines": (SMALL + "5 5\n", r"line 4: expected the end of the file, got '5 5'"),
    "first pointer": (
        SMALL.replace("0 2 2 4", "1 2 2 4"),
        r"line 2: row pointers, number 0: expected 0, got 1",
    ),
    "last pointer": (
        SMALL.replace("0 2 2 4", "0 2 2 3"),
        r"line 2: row pointers, number 3 \(the last\): expected 4, the nnz of line 1, got 3",
    ),
    "falling pointers": (
        SMALL.replace("0 2 2 4", "0 3 2 4"),
        r"line 2: row pointers, number 2: expected at least 3, the pointer before it, got 2",
    ),
    "pointers over nnz": (
        SMALL.replace("0 2 2 4", "0 9 9 4"),
        r"line 2: row pointers, number 3: expected at least 9",
    ),
    "negative pointer": (
        SMALL.replace("0 2 2 4", "0 2 -2 4"),
        r"line 2: row pointers, number 2: expected a whole number from 0, got '-2'",
    ),
    "pointer over int32": (
        SMALL.replace("0 2 2 4", "0 2 2147483648 4"),
        r"line 2: row pointers, number 2: expected at most 2147483647",
    ),
    "pointer over int64": (
        SMALL.replace("0 2 2 4", f"0 2 {2**64 + 2} 4"),
        r"line 2: row pointers, number 2: expected at most 2147483647",
    ),
    "column over int64": (
        SMALL.replace("0 3 1 2", f"0 3 {2**64 + 1} 2"),
        r"line 3: column indices, number 2: expected at most 2147483647",
    ),
    "column out of range": (
        SMALL.replace("0 3 1 2", "0 4 1 2"),
        r"line 3: column indices, number 1 \(row 0\): expected a column below 4, got 4",
    ),
    "negative column": (
        SMALL.replace("0 3 1 2", "0 3 -1 2"),
        r"line 3: column indices, number 2: expected a whole number from 0, got '-1'",
    ),
    "unsorted": (
        SMALL.replace("0 3 1 2", "0 3 2 1"),
        r"line 3: column indices, number 3 \(row 2\): expected a column above 2 .*, got 1",
    ),
    "twice": (
        SMALL.replace("0 3 1 2", "0 0 1 2"),
        r"line 3: column indices, number 1 \(row 0\): expected a column above 0 .*, got 0",
    ),
    "word": (
        SMALL.replace("0 3 1 2", "0 3 one 2"),
        r"line 3: column indices, number 2: expected a whole number from 0, got 'one'",
    ),
    "fraction index": (SMALL.replace("0 3 1 2", "0 3 1.5 2"), r"line 3: .* number 2: .*'1\.5'"),
    "exponent": (SMALL.replace("0 3 1 2", "0 3 1e0 2"), r"line 3: .* number 2: .*'1e0'"),
    "plus": (SMALL.replace("0 3 1 2", "0 3 +1 2"), r"line 3: .* number 2: .*'\+1'"),
    "nul": (SMALL.replace("0 3 1 2", "0 3 \0 2"), r"line 3: .* number 2: .*x00"),
    "other digits": (SMALL.replace("0 3 1 2", "0 3 ¹ 2"), r"line 3: .* number 2: expected a whole"),
    "binary": (bytes(range(256)) * 50, r"line 1: expected 'rows, cols, nnz'"),
    "gigantic line": (b"1" * 10**7, r"line 1: expected 'rows, cols, nnz', got '1{64}'\.\.\."),
    "gigantic number": (
        "1, 3, 1\n0 1\n" + "1" * 40000,
        r"line 3: column indices, number 0: expected at most 2147483647",
    ),
}


@pytest.mark.parametrize("name", BAD_SMTX)
def test_bad_smtx(name: str, tmp_path: Path) -> None:
    text, message = BAD_SMTX[name]
    (tmp_path / "bad.smtx").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=r"bad\.smtx: " + message):
        sl.load_smtx(tmp_path / "bad.smtx")


BAD_MTX: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"line 1: expected '%%MatrixMarket .*', got nothing"),
    "binary": (bytes(range(256)) * 50, r"line 1: expected '%%MatrixMarket"),
    "no banner": ("3 3 1\n1 1 1\n", r"line 1: expected '%%MatrixMarket .*', got '3 3 1'"),
    "vector": (HEAD.replace("matrix coord", "vector coord"), r"line 1: object: expected matrix"),
    "format": (HEAD.replace("coordinate", "ragged"), r"line 1: format: expected coordinate or arr"),
    "complex": (
        HEAD.replace("real", "complex") + "1 1 1\n1 1 1 1\n",
        r"line 1: field: .*'complex'",
    ),
    "hermitian": (HEAD.replace("general", "hermitian"), r"line 1: symmetry: .*got 'hermitian'"),
    "pattern array": (
        HEAD.replace("coordinate real", "array pattern") + "1 1\n1\n",
        r"line 1: field: expected numbers",
    ),
    "no sizes": (HEAD + "% nothing\n", r"line 3: expected 'rows columns entries', got nothing"),
    "two sizes": (HEAD + "3 3\n", r"line 2: expected 'rows columns entries', got '3 3'"),
    "negative size": (HEAD + "3 -3 1\n1 1 1\n", r"line 2: columns: expected a whole number .*'-3'"),
    "size over int32": (HEAD + "3 3 4294967296\n1 1 1\n", r"line 2: entries: expected at most"),
    "oblong symmetric": (
        HEAD.replace("general", "symmetric") + "3 2 1\n1 1 1\n",
        r"line 2: columns: expected 3 columns, as many as rows \(symmetric\), got 2",
    ),
    "huge entries": (
        HEAD + f"50000 50000 {BILLION}\n1 1 1\n",
        r"line 2: entries: expected 1000000000 lines of numbers after this one, got 1: the file is "
        "cut off",
    ),
    "huge rows": (
        HEAD + f"{BILLION} 3 1\n1 1 1\n",
        r"line 2: rows: expected at most 1048576 for a file of 6 bytes, got 1000000000",
    ),
    "huge array": (
        HEAD.replace("coordinate", "array") + f"{BILLION} {BILLION}\n1\n",
        r"line 2: rows and columns: expected 1000000000000000000 lines .*, got 1: .* cut off",
    ),
    "cut": (HEAD + "3 3 2\n1 1 1\n", r"line 2: entries: expected 2 lines .*, got 1: .* cut off"),
    "cut in a line": (HEAD + "3 3 2\n1 1 1\n2 2", r"line 4: expected 3 numbers, got 2: '2 2'"),
    "too long": (HEAD + "3 3 1\n1 1 1\n2 2 1\n", r"line 2: entries: expected 1 lines .*, got more"),
    "more columns": (
        HEAD + "3 3 1\n1 1 1 0.5\n",
        r"line 3: expected 3 numbers, got 4: '1 1 1 0.5'",
    ),
    "uneven lines": (HEAD + "3 3 2\n1 1\n3 2 1 5\n", r"line 3: expected 3 numbers, got 2: '1 1'"),
    "two lines in one": (HEAD + "3 3 2\n1 1 5 2 2 6\n", r"line 3: expected 3 numbers, got 6"),
    "row 0": (
        HEAD + "3 3 1\n0 1 1\n",
        r"line 3: row: expected a whole number from 1 to 3, got '0'",
    ),
    "row 4": (HEAD + "3 2 1\n4 1 1\n", r"line 3: row: expected a whole .* from 1 to 3, got '4'"),
    "column 4": (HEAD + "4 3 1\n3 4 1\n", r"line 3: column: expected .* from 1 to 3, got '4'"),
    "negative row": (HEAD + "3 3 1\n-1 1 1\n", r"line 3: row: expected .*, got '-1'"),
    "nan row": (HEAD + "3 3 1\nnan 1 1\n", r"line 3: row: expected a whole number .*, got 'nan'"),
    "word": (HEAD + "3 3 1\n1 1 x\n", r"line 3: value: expected a number, got 'x'"),
    "zero byte": (HEAD + "3 3 2\n1 1 1\n1 2 0.\0\n", r"line 4: value: expected a .*'0\..x00'"),
    "zero byte far away": (
        HEAD + "9 9 262145\n" + "1 1 1\n" * 2**18 + "1 1 \0",
        r"line 262147: value: expected a number, got '.x00'",
    ),
    "form feed": (
        HEAD + "3 3 1\n1 1\f1\n",
        r"line 3: expected numbers divided by blanks, got b'.x0c'",
    ),
    "comment": (HEAD + "3 3 2\n1 1 1\n% 1 1\n", r"line 4: row: expected a whole .*, got '%'"),
    "glued": (HEAD + "3 3 2\n1 1 1\n1 2 1-2\n", r"line 4: value: expected a number, got '1-2'"),
    "glued and short": (HEAD + "3 3 1\n1 1-2\n", r"line 3: expected 3 numbers, got 2: '1 1-2'"),
    "half a word": (HEAD + "3 3 1\n1 1 infinit\n", r"line 3: value: .*, got 'infinit'"),
    "exponent": (HEAD + "3 3 1\n1 1 1e\n", r"line 3: value: expected a number, got '1e'"),
    "no number": (HEAD + "3 3 1\n1 1 tiny\n", r"line 3: value: expected a number, got 'tiny'"),
    "fraction index": (HEAD + "3 3 1\n1.5 1 1\n", r"line 3: row: expected a whole .*'1\.5'"),
    "over int64": (HEAD + f"3 3 1\n{10**30} 1 1\n", r"line 3: row: expected .*, got '1000000000"),
    "value over int64": (
        HEAD.replace("real", "integer") + f"3 3 1\n1 1 {10**30}\n",
        r"line 3: value: expected a whole number of 64 bits, got '1000000000",
    ),
    "fraction of integer": (
        HEAD.replace("real", "integer") + "3 3 1\n1 1 0.5\n",
        r"line 3: value: expected a whole number, got '0\.5'",
    ),
    "over float64": (HEAD + "3 3 1\n1 1 1e999\n", r"line 3: value: .* that float64 holds, got '1e"),
    "gigantic line": (HEAD + "3 3 1\n" + "1 " * 10**6, r"line 3: expected 3 numbers, got \d+: "),
    "gigantic blank": (HEAD + "3 3 1\n" + " " * 10**7, r"line 3: expected a line below 65536"),
    "over float32": (HEAD + "1 1 1\n1 1 1e300\n", r"values: expected numbers that torch.float32"),
    "long comment": (
        HEAD + "%" + "x" * 10**6 + "\n1 1 0\n",
        r"line 2: expected a line below 65536",
    ),
    "many digits": (HEAD + "3 3 " + "1" * 60000 + "\n", r"line 2: entries: expected at most"),
}


@pytest.mark.parametrize("name", BAD_MTX)
def test_bad_mtx(name: str, tmp_path: Path) -> None:
    text, message = BAD_MTX[name]
    (tmp_path / "bad.mtx").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=r"bad\.mtx: " + message):
        sl.load_mtx(tmp_path / "bad.mtx")


def test_integers_that_the_dtype_changes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mtx"
    path.write_text(HEAD.replace("real", "integer") + "1 1 1\n1 1 3000000000\n")
    with pytest.raises(ValueError, match=r"torch\.int32 holds, got 3000000000; pass another dtype"):
        sl.load_mtx(path, dtype=torch.int32)
    assert sl.load_mtx(path, dtype=torch.int64).values().tolist() == [3000000000]
    path.write_text(HEAD + "1 1 1\n1 1 0.5\n")
    with pytest.raises(ValueError, match=r"torch\.int32 holds, got 0\.5"):
        sl.load_mtx(path, dtype=torch.int32)


@pytest.mark.parametrize("load", [sl.load_smtx, sl.load_mtx])
def test_what_is_no_file(load: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file, got a directory"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.smtx")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
        with pytest.raises(ValueError, match="expected a file, got something else"):
            load(tmp_path / "pipe")
    for dtype in (torch.bool, "float32"):
        with pytest.raises(TypeError, match="expected the dtype of values"):
            load(tmp_path, dtype=dtype)


HUGE = {
    "smtx": "1000000000, 1000000000, 1000000000\n0 2 2 4\n0 3 1 2\n",
    "entries.mtx": HEAD + f"50000 50000 {BILLION}\n1 1 1\n",
    "rows.mtx": HEAD + f"{BILLION} 3 1\n1 1 1\n",
    "array.mtx": HEAD.replace("coordinate", "array") + f"{BILLION} {BILLION}\n1\n",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_header_takes_no_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{name}"
    path.write_text(HUGE[name])
    load = sl.load_mtx if name.endswith("mtx") and name != "smtx" else sl.load_smtx
    with pytest.raises(ValueError, match="expected"):
        load(path)  # what is imported on the way is not counted below
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="expected"):
            load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize(
    ("flood", "message"),
    [
        (b"1 1 1\n", r"a\.mtx\.gz: line 2: entries: expected 9 lines .*, got more"),
        (b"   \n", r"a\.mtx\.gz: line 2: entries: expected 9 lines .*, got 0: the file is cut off"),
    ],
)
def test_a_packed_flood_takes_little_memory(flood: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mtx.gz"
    path.write_bytes(gzip.compress((HEAD + "9 9 9\n").encode() + flood * 2**23, 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            sl.load_mtx(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(flood) * 2**23 / 2


def test_memory_is_a_few_times_the_file(tmp_path: Path) -> None:
    path = write_smtx(tmp_path / "a.smtx", power_law(20000, 1000, 200000))
    tracemalloc.start()
    try:
        sl.load_smtx(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * path.stat().st_size


@pytest.mark.parametrize("name", ["a.smtx", "a.mtx"])
def test_every_byte_may_be_wrong(name: str, tmp_path: Path) -> None:
    """Whatever stands there: a valid matrix or a `ValueError`, and nothing else."""
    given = (SMALL if name == "a.smtx" else HEAD + "3 3 2\n1 3 0.5\n2 2 -1\n").encode()
    load = sl.load_smtx if name == "a.smtx" else sl.load_mtx
    refused = 0
    for at in range(len(given)):
        for byte in b"\0 \n9-.x\xff":
            (tmp_path / name).write_bytes(given[:at] + bytes([byte]) + given[at + 1 :])
            try:
                load(tmp_path / name).validate()
            except ValueError as error:
                assert name in str(error)  # noqa: PT017 - either is right
                refused += 1
    assert refused > 4 * len(given)
