"""`sl.load_mtx`: MatrixMarket files, parsed a block of lines at a time by numpy."""

from __future__ import annotations

import bz2
import gzip
import os
import re
import warnings
import zlib
from typing import IO, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from sparse_layouts.csr_tensor import CSRTensor
from sparse_layouts.file_errors import (
    LARGEST_INDEX,
    LONGEST_LINE,
    PathLike,
    check_values_dtype,
    file_size,
    refuse_file,
    shown,
    size_in_header,
)

FEW_ROWS = 2**20  # so many row pointers are made whatever the file's size

FIELDS = ("real", "double", "integer", "pattern")
SYMMETRIES = ("general", "symmetric", "skew-symmetric")

IN_NUMBERS = b"0123456789+-.eE \t\r\n" + b"nanifityNANIFITY"  # nan, inf, infinity
WHOLE = re.compile(rb"[+-]?[0-9]+")
REAL = re.compile(rb"[+-]?(nan|inf(inity)?|([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?)", re.I)
WIDEST = 1000  # digits of which Python makes an int
BLOCK_BYTES = 2**18  # read at once; checking takes some 20 times that


def load_mtx(
    path: PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> CSRTensor:
    """The matrix (rows, cols) of a MatrixMarket file (`.mtx`, `.mtx.gz`, `.mtx.bz2`).

    Formats `coordinate` and `array` (of which the entries that are not 0 are stored); fields real,
    integer and pattern (ones); general, symmetric and skew-symmetric, whose mirrored entries are
    stored too. Entries that the file names twice are added up, as scipy does. Values are rounded to
    `dtype`; `torch.float64` keeps every digit of real ones.

    Raises `ValueError` that names file and line or field: not a MatrixMarket file, complex, cut
    off, indices out of range, values that `dtype` cannot hold. A header that claims more than the
    file holds costs no memory. (`scipy.io.mmread` is faster and for files that are trusted: scipy
    1.17 ends the process on some that are broken.) Source:
    https://math.nist.gov/MatrixMarket/formats.html.

    >>> import os, tempfile, sparse_layouts as sl
    >>> path = os.path.join(tempfile.mkdtemp(), "small.mtx")
    >>> with open(path, "w") as file:
    ...     _ = file.write("%%MatrixMarket matrix coordinate real symmetric\\n2 2 1\\n2 1 0.5\\n")
    >>> sl.load_mtx(path).to_dense()
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])
    """
    import scipy.sparse

    check_values_dtype(dtype, "load_mtx")
    file_size(path)
    try:
        with _open_mtx(path) as file:
            header = _mtx_header(path, file)
            entries = _entries(path, header, file)
    except (zlib.error, EOFError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the file cannot be read at all
        raise ValueError(f"{os.fspath(path)}: cannot be unpacked: {error}") from error
    rows, cols = header.sizes[:2]
    if header.coordinate:
        matrix = scipy.sparse.coo_array(_mirrored(header, *entries), shape=(rows, cols)).tocsr()
    else:
        matrix = scipy.sparse.csr_array(_dense(header, entries[0]))
    matrix.sort_indices()
    if matrix.nnz > LARGEST_INDEX:
        refuse_file(path, None, "nnz", f"at most {LARGEST_INDEX} entries (int32)", str(matrix.nnz))
    values = _rounded(path, torch.from_numpy(matrix.data), dtype)
    crow, col = (torch.from_numpy(a.astype(np.int32)) for a in (matrix.indptr, matrix.indices))
    return CSRTensor(values.to(device), crow.to(device), col.to(device), shape=(rows, cols))


def _rounded(path: PathLike, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`; refuses what becomes infinite, or no longer the same integer."""
    values = exact.to(dtype)
    if dtype.is_floating_point:
        lost = exact.isfinite() & ~values.double().isfinite()
    else:
        lost = values.to(exact.dtype) != exact
    if bool(lost.any()):
        got = f"{exact[lost][0].item()}; pass another dtype, such as torch.float64"
        refuse_file(path, None, "values", f"numbers that {dtype} holds", got)
    return values


class _MtxHeader(NamedTuple):
    coordinate: bool
    field: str
    symmetry: str
    sizes: tuple[int, ...]  # rows, cols and, of coordinates, entries
    lines: int

    @property
    def lines_of_numbers(self) -> int:
        """How many lines the file has to hold after its header."""
        rows, cols = self.sizes[:2]
        if self.coordinate:
            return self.sizes[2]
        if self.symmetry == "symmetric":
            return rows * (rows + 1) // 2
        return rows * (rows - 1) // 2 if self.symmetry == "skew-symmetric" else rows * cols

    @property
    def numbers_a_line(self) -> int:
        """Row, column and value, as far as they are there."""
        return (2 if self.field == "pattern" else 3) if self.coordinate else 1


def _open_mtx(path: PathLike) -> IO[bytes]:
    name = os.fspath(path)
    if name.endswith(".gz"):
        return gzip.open(name, "rb")  # type: ignore[return-value]
    return bz2.open(name, "rb") if name.endswith(".bz2") else open(name, "rb")


def _mtx_header(path: PathLike, file: IO[bytes]) -> _MtxHeader:
    banner = file.readline(LONGEST_LINE)
    words = banner.decode("ascii", "replace").split()
    if len(words) != 5 or words[0] != "%%MatrixMarket":
        expected = "'%%MatrixMarket matrix <format> <field> <symmetry>'"
        refuse_file(path, 1, "", expected, shown(banner))
    known = (("matrix",), ("coordinate", "array"), FIELDS, SYMMETRIES)
    names = ("object", "format", "field", "symmetry")
    for name, word, accepted in zip(names, words[1:], known, strict=True):
        if word.lower() not in accepted:
            refuse_file(path, 1, name, " or ".join(accepted), shown(word.encode()))
    form, field, symmetry = (word.lower() for word in words[2:])
    if form == "array" and field == "pattern":
        refuse_file(path, 1, "field", "numbers (an array has no pattern)", "'pattern'")

    number, line = 1, b"%"
    while line.startswith(b"%") or (line and not line.strip()):
        number, line = number + 1, file.readline(LONGEST_LINE)
        if len(line) == LONGEST_LINE:
            refuse_file(path, number, "", f"a line below {LONGEST_LINE} bytes", shown(line))
    fields = ("rows", "columns", "entries") if form == "coordinate" else ("rows", "columns")
    texts = line.split()
    if len(texts) != len(fields):
        refuse_file(path, number, "", f"'{' '.join(fields)}'", shown(line))
    sizes = tuple(
        size_in_header(path, number, f, text) for f, text in zip(fields, texts, strict=True)
    )
    if symmetry != "general" and sizes[0] != sizes[1]:
        expected = f"{sizes[0]} columns, as many as rows ({symmetry})"
        refuse_file(path, number, "columns", expected, str(sizes[1]))
    return _MtxHeader(form == "coordinate", field, symmetry, sizes, number)


def _entries(path: PathLike, header: _MtxHeader, file: IO[bytes]) -> list[np.ndarray]:
    """What follows the header: rows and columns (from 0) and values, or the values of an array.

    Read a block at a time, so that memory goes to numbers that are there, whatever is claimed.
    """
    width, expected = header.numbers_a_line, header.lines_of_numbers
    dtype = np.float64 if header.field in ("real", "double") else np.int64
    blocks = [np.empty((0, width), dtype)]
    line, found, held = header.lines, 0, 0
    while block := file.read(BLOCK_BYTES):
        rest = file.readline(LONGEST_LINE)
        block += rest
        numbers = _block(path, header, line, block, dtype)
        line, found, held = line + block.count(b"\n"), found + len(numbers), held + len(block)
        blocks.append(numbers)
        if len(rest) == LONGEST_LINE:
            refuse_file(path, line + 1, "", f"a line below {LONGEST_LINE} bytes", shown(rest))
        if found > expected:
            break
    if found != expected:
        got = f"{found}: the file is cut off" if found < expected else "more"
        names = "entries" if header.coordinate else "rows and columns"
        refuse_file(path, header.lines, names, f"{expected} lines of numbers after this one", got)
    if header.sizes[0] > max(FEW_ROWS, held):
        most = f"at most {max(FEW_ROWS, held)} for a file of {held} bytes"
        got = (
            f"{header.sizes[0]}: row pointers would take far more memory than the entries. "
            "scipy.io.mmread reads such a matrix as coordinates"
        )
        refuse_file(path, header.lines, "rows", most, got)
    columns = list(np.concatenate(blocks).T)
    if header.coordinate:
        columns[:2] = [column.astype(np.int64) - 1 for column in columns[:2]]
    if header.field == "pattern":
        columns.append(np.ones(found))
    return columns


def _block(path: PathLike, header: _MtxHeader, line: int, block: bytes, dtype: type) -> np.ndarray:
    """The numbers (lines, width) of a block of whole lines, the first of them after `line`."""
    if block.translate(None, IN_NUMBERS):
        _refuse_line(path, header, line, block)
    text = np.frombuffer(block + b"\n", dtype=np.uint8)
    blank = text <= ord(" ")
    starts = ~blank & np.concatenate([[True], blank[:-1]])
    each = np.diff(np.cumsum(starts)[text == ord("\n")], prepend=0)
    tokens, width = int(starts.sum()), header.numbers_a_line
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # as numpy before 2.4 says: no number
        try:
            numbers: np.ndarray = np.fromstring(block if tokens else b"", dtype=dtype, sep=" ")
        except (DeprecationWarning, ValueError):
            _refuse_line(path, header, line, block)
    # numpy cuts what int64 cannot hold and calls 1e999 infinite
    wrong = numbers.size != tokens or bool(((each != 0) & (each != width)).any())
    if dtype is np.int64:
        limits = np.iinfo(np.int64)
        wrong |= bool(((numbers == limits.max) | (numbers == limits.min)).any())
    elif not np.isfinite(numbers).all():
        wrong |= bool(np.isinf(numbers).any()) and b"inf" not in block.lower()
    if not wrong and header.coordinate:
        numbers = numbers.reshape(-1, width)
        for column, size in enumerate(header.sizes[:2]):
            index = numbers[:, column]
            wrong |= bool((~((index >= 1) & (index <= size)) | (index % 1 != 0)).any())
    if wrong:
        _refuse_line(path, header, line, block)
    return numbers.reshape(-1, width)


def _refuse_line(path: PathLike, header: _MtxHeader, line: int, block: bytes) -> NoReturn:
    """Refuses a block for the first line in which something is wrong, read slowly."""
    number = WHOLE if header.field in ("integer", "pattern") else REAL
    first = line + 1
    for line, text in enumerate(block.split(b"\n"), first):
        words = text.split()
        if words and len(words) != header.numbers_a_line:
            expected = f"{header.numbers_a_line} numbers"
            refuse_file(path, line, "", expected, f"{len(words)}: {shown(text)}")
        indices = words[:2] if header.coordinate else []
        for field, word, size in zip(("row", "column"), indices, header.sizes, strict=False):
            if not WHOLE.fullmatch(word) or not 1 <= int(word[:WIDEST]) <= size:
                refuse_file(path, line, field, f"a whole number from 1 to {size}", shown(word))
        for word in words[len(indices) :]:
            kind = "a whole number" if number is WHOLE else "a number"
            if not number.fullmatch(word):
                refuse_file(path, line, "value", kind, shown(word))
            if number is WHOLE and not -(2**63) < int(word[:WIDEST]) < 2**63 - 1:
                refuse_file(path, line, "value", f"{kind} of 64 bits", shown(word))
            if number is REAL and b"inf" not in word.lower() and np.isinf(float(word)):
                refuse_file(path, line, "value", f"{kind} that float64 holds", shown(word))
    expected, odd = "numbers divided by blanks", block.translate(None, IN_NUMBERS)
    refuse_file(path, first, "", expected, f"{odd[:1]!r} here or below")


def _mirrored(
    header: _MtxHeader, rows: np.ndarray, cols: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Values at (rows, columns), with those that symmetry adds."""
    if header.symmetry != "general":
        off = rows != cols
        sign = -1 if header.symmetry == "skew-symmetric" else 1
        values = np.concatenate([values, sign * values[off]])
        rows, cols = np.concatenate([rows, cols[off]]), np.concatenate([cols, rows[off]])
    return values, (rows, cols)


def _dense(header: _MtxHeader, values: np.ndarray) -> np.ndarray:
    """The matrix of an array file: column by column, of symmetric ones the lower triangle."""
    rows, cols = header.sizes
    if header.symmetry == "general":
        return values.reshape(cols, rows).T
    skew = header.symmetry == "skew-symmetric"
    made = np.zeros((rows, cols), values.dtype)
    column, row = np.triu_indices(rows, k=int(skew))
    made[row, column] = values
    made[column, row] = -values if skew else values
    return made
