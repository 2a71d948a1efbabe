"""What the readers of files from elsewhere share: checks of sizes, and the words of a refusal.

A file is not trusted: nothing is allocated because a header says so, only for what the file holds.
"""

from __future__ import annotations

import os
import stat
from typing import NoReturn

import torch

PathLike = str | os.PathLike[str]

LARGEST_INDEX = 2**31 - 1  # indices are int32
LONGEST_LINE = 2**16  # bytes of a header or comment line; the formats say 1024 at most
LONGEST_QUOTE = 64  # bytes of a file that an error message shows


def file_size(path: PathLike) -> int:
    """Bytes of a file; refuses what is no regular file, such as a directory or a device."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "something else"
        raise ValueError(f"{os.fspath(path)}: expected a file, got {kind}")
    return found.st_size


def size_in_header(path: PathLike, line: int, field: str, text: bytes) -> int:
    """A size in a header: a whole number that int32 holds."""
    if not text.isdigit():
        refuse_file(path, line, field, "a whole number from 0", shown(text))
    if len(text.lstrip(b"0")) > 10 or int(text) > LARGEST_INDEX:
        refuse_file(path, line, field, f"at most {LARGEST_INDEX} (int32 indices)", shown(text))
    return int(text)


def check_values_dtype(dtype: torch.dtype, what: str) -> None:
    """Refuses what is no dtype of values."""
    if not isinstance(dtype, torch.dtype) or dtype == torch.bool:
        raise TypeError(f"{what}: expected the dtype of values, such as torch.float32, got {dtype}")


def shown(text: bytes) -> str:
    """The beginning of what a file holds, for an error message."""
    start = text[:LONGEST_QUOTE].strip()
    cut = "..." if len(text.strip()) > len(start) else ""
    return (repr(start)[1:] if start else "nothing") + cut


def refuse_file(path: PathLike, line: int | None, field: str, expected: str, got: str) -> NoReturn:
    """Raises the `ValueError` that names file, line and field; `line` None where it has no part."""
    where = "" if line is None else f"line {line}: "
    what = f"{field}: " if field else ""
    raise ValueError(f"{os.fspath(path)}: {where}{what}expected {expected}, got {got}")
