"""The families of layouts that the explorer and the command line build, with their parameters."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from sparse_layouts.band_masks import causal, sink_window, sliding_window
from sparse_layouts.bigbird_tensor import TABLE_LENGTHS, bigbird
from sparse_layouts.bsr_factory import bsr
from sparse_layouts.csr_factory import csc, csr
from sparse_layouts.document_masks import document
from sparse_layouts.grouped_nm_tensor import grouped_nm
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.local_stride_tensor import local_stride
from sparse_layouts.nm_factory import nm
from sparse_layouts.sparsifiers import Magnitude

Values = dict[str, Any]


@contextlib.contextmanager
def sizes_that_fit(what: str) -> Iterator[None]:
    """Raises `ValueError` with one line where what is built has no room in memory, or its sizes are
    no numbers of torch's.
    """
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError, ValueError) as error:
        said = str(error).lower()
        known = any(words in said for words in ("memory", "overflow", "maximum allowed size"))
        if not known and not isinstance(error, (MemoryError, OverflowError)):
            raise
        raise ValueError(
            f"{what}: too large for this machine's memory; take smaller ones"
        ) from error


class Parameter(NamedTuple):
    """One parameter of a family: its default, and what a slider offers: `choices`, or whole
    numbers from `low` to `high`. Its kind (int, float, bool, str) is that of the default. `few` are
    the values that a page without Python offers; none: the default alone.
    """

    name: str
    default: Any
    about: str
    choices: tuple[Any, ...] = ()
    low: int = 0
    high: int = 0
    few: tuple[Any, ...] = ()

    @property
    def on_page(self) -> tuple[Any, ...]:
        """The values that a page without Python offers."""
        return self.few or (self.default,)

    def read(self, given: Any) -> Any:
        """The value in this parameter's kind, from Python or from a command line.

        Raises `ValueError` with one line for what is of another kind.
        """
        kind = type(self.default)
        if kind is bool:
            if isinstance(given, bool):
                return given
            if str(given).lower() in ("true", "yes", "1", "false", "no", "0"):
                return str(given).lower() in ("true", "yes", "1")
            raise ValueError(f"{self.name}: expected true or false, got {given!r}")
        if kind is str:
            return str(given)
        try:
            if isinstance(given, bool) or (kind is int and isinstance(given, float)):
                raise ValueError
            return kind(given)
        except (TypeError, ValueError):
            word = "a whole number" if kind is int else "a number"
            raise ValueError(f"{self.name}: expected {word}, got {given!r}") from None


class Family(NamedTuple):
    """A kind of layout: how one is built, and the line of code that builds it.

    `is_mask`: an attention mask (H, N, N), else a matrix of weights (M, K).
    """

    name: str
    title: str
    about: str
    is_mask: bool
    parameters: tuple[Parameter, ...]
    build: Callable[[Values], LayoutTensor]
    code: Callable[[Values], str]

    def values(self, given: Mapping[str, Any]) -> Values:
        """All parameters, those that are given and the defaults.

        Raises `ValueError` with one line for a name that is no parameter, or a value of another
        kind.
        """
        own = {p.name: p for p in self.parameters}
        for name in given:
            if name not in own:
                raise ValueError(f"{self.name} has no parameter {name!r}; it has {', '.join(own)}")
        return {name: p.read(given.get(name, p.default)) for name, p in own.items()}

    def built(self, values: Values) -> LayoutTensor:
        """The layout. Raises `ValueError` or `TypeError` with one line where values make none."""
        with sizes_that_fit(", ".join(f"{name}={value}" for name, value in values.items())):
            return self.build(values)


LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BLOCKS = (16, 32, 64, 128)
SIZES = (256, 512, 1024, 2048, 4096)

_SEQ_LEN = Parameter("seq_len", 2048, "tokens", choices=LENGTHS)
_BLOCK = Parameter("block_size", 64, "edge of a block, in tokens", choices=BLOCKS)
_ANY_BLOCK = _BLOCK._replace(few=(32, 64, 128))
_HEADS = Parameter("num_heads", 4, "query heads", low=1, high=32)
_CAUSAL = Parameter("causal", True, "no token attends to a later one", few=(True, False))
_ROWS = Parameter("rows", 512, "M", choices=SIZES)
_COLUMNS = Parameter("columns", 512, "K", choices=SIZES)
_DENSITY = Parameter(
    "density",
    0.25,
    "what is kept of it",
    choices=(0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 0.75),
    few=(0.02, 0.05, 0.1, 0.25, 0.5),
)


def _call(name: str, first: str, options: Values) -> str:
    listed = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"sl.{name}({first}{listed})"


def _mask_family(
    name: str,
    title: str,
    about: str,
    make: Callable[..., LayoutTensor],
    *parameters: Parameter,
) -> Family:
    """A factory whose arguments are `seq_len` and these parameters, by name."""

    def build(values: Values) -> LayoutTensor:
        rest = {key: value for key, value in values.items() if key != "seq_len"}
        return make(values["seq_len"], **rest)

    def code(values: Values) -> str:
        rest = {key: value for key, value in values.items() if key != "seq_len"}
        return _call(name, str(values["seq_len"]), rest)

    return Family(name, title, about, True, (_SEQ_LEN, *parameters), build, code)


def document_bounds(seq_len: int, documents: int) -> list[int]:
    """0, the ends of `documents` documents of different lengths, and `seq_len`: the same every
    time.

    >>> from sparse_layouts.viewing.families import document_bounds
    >>> document_bounds(100, 3)
    [0, 16, 50, 100]
    """
    if not 1 <= documents <= max(1, seq_len):
        raise ValueError(f"documents: expected 1 to {seq_len}, got {documents}")
    total = documents * (documents + 1) // 2
    ends = [seq_len * (i * (i + 1) // 2) // total for i in range(1, documents)]
    return [0, *ends, seq_len]


def _documents(values: Values) -> tuple[list[int], Values]:
    bounds = document_bounds(values["seq_len"], values["documents"])
    return bounds, {"block_size": values["block_size"], "causal": values["causal"]}


def _build_documents(values: Values) -> LayoutTensor:
    bounds, rest = _documents(values)
    return document(bounds, **rest)


def _code_of_documents(values: Values) -> str:
    bounds, rest = _documents(values)
    return _call("document", str(bounds), rest)


def random_weights(rows: int, columns: int) -> torch.Tensor:
    """fp32 (rows, columns), the same every time; some rows and columns are larger than others, as
    in a trained matrix.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"expected rows and columns of at least 1, got {rows} and {columns}")
    draw = torch.Generator().manual_seed(0)
    scale = torch.rand(rows, 1, generator=draw) + torch.rand(1, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw) * scale


def _weight_family(
    name: str,
    title: str,
    about: str,
    make: Callable[..., LayoutTensor],
    arguments: Callable[[Values], Values],
    shown: Callable[[Values], str],
    *parameters: Parameter,
) -> Family:
    def build(values: Values) -> LayoutTensor:
        return make(random_weights(values["rows"], values["columns"]), **arguments(values))

    def code(values: Values) -> str:
        return f"sl.{name}(torch.randn({values['rows']}, {values['columns']}), {shown(values)})"

    return Family(name, title, about, False, (_ROWS, _COLUMNS, *parameters), build, code)


def _kept(values: Values) -> Values:
    return {"keep": Magnitude(values["density"])}


_N = Parameter("n", 2, "kept of every group", low=1, high=15, few=(1, 2, 4))
_M = Parameter("m", 4, "entries of a group", low=2, high=16, few=(4, 8, 16))

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _mask_family(
            "local_stride",
            "local stride",
            "near blocks, and every vert_stride-th block column, another one in each head",
            local_stride,
            _ANY_BLOCK,
            Parameter("local_blocks", 4, "near blocks", low=0, high=32, few=(1, 4, 8)),
            Parameter(
                "vert_stride", 8, "one block column in so many", low=1, high=32, few=(2, 4, 8, 16)
            ),
            _HEADS,
            _CAUSAL,
        ),
        _mask_family(
            "bigbird",
            "BigBird",
            "first and last block, neighbours, and random blocks, counted as often as drawn",
            bigbird,
            _BLOCK._replace(few=(32, 64)),
            Parameter(
                "num_random_blocks", 3, "random blocks of a row", low=0, high=8, few=(0, 1, 3, 5)
            ),
            _HEADS,
            Parameter(
                "source",
                "hf-train",
                "who draws",
                choices=tuple(TABLE_LENGTHS),
                few=tuple(TABLE_LENGTHS),
            ),
            Parameter("seed", 0, "the layer's index", low=0, high=23),
        ),
        _mask_family(
            "sliding_window",
            "sliding window",
            "the last tokens, or those around",
            sliding_window,
            _BLOCK,
            Parameter("window", 256, "tokens", low=1, high=4096, few=(64, 128, 256, 512, 1024)),
            _CAUSAL,
        ),
        _mask_family(
            "sink_window",
            "sinks and window",
            "the last tokens, and the first ones for everybody",
            sink_window,
            _BLOCK,
            Parameter("window", 256, "tokens", low=1, high=4096, few=(64, 128, 256, 512)),
            Parameter("sinks", 64, "tokens", low=0, high=1024, few=(0, 16, 64, 256)),
        ),
        Family(
            "document",
            "documents",
            "packed documents, each of which attends to itself alone",
            True,
            (
                _SEQ_LEN,
                _BLOCK,
                Parameter("documents", 5, "how many", low=1, high=24, few=(1, 3, 5, 8, 12)),
                _CAUSAL,
            ),
            _build_documents,
            _code_of_documents,
        ),
        _mask_family("causal", "causal", "every earlier token", causal, _ANY_BLOCK),
        _weight_family(
            "nm",
            "n:m",
            "the n largest of every m entries along a row",
            nm,
            lambda v: {"n": v["n"], "m": v["m"]},
            lambda v: f"{v['n']}, {v['m']}",
            _N,
            _M,
        ),
        _weight_family(
            "grouped_nm",
            "grouped n:m",
            "n of every m rows, every choice of rows for g columns of a chunk",
            grouped_nm,
            lambda v: {"n": v["n"], "m": v["m"], "g": v["g"]},
            lambda v: f"{v['n']}, {v['m']}, {v['g']}",
            _N._replace(few=(1, 2)),
            _M._replace(few=(2, 4)),
            Parameter("g", 4, "columns that share a choice", low=1, high=16, few=(2, 4, 8)),
        ),
        _weight_family(
            "bsr",
            "BSR",
            "the blocks of largest norm",
            bsr,
            lambda v: {"block_size": v["block_size"], **_kept(v)},
            lambda v: f"block_size={v['block_size']}, keep=sl.Magnitude({v['density']})",
            Parameter(
                "block_size",
                32,
                "edge of a block",
                choices=(8, 16, 32, 64, 128),
                few=(16, 32, 64),
            ),
            _DENSITY,
        ),
        _weight_family(
            "csr",
            "CSR",
            "the largest entries, row by row",
            csr,
            _kept,
            lambda v: f"keep=sl.Magnitude({v['density']})",
            _DENSITY,
        ),
        _weight_family(
            "csc",
            "CSC",
            "the largest entries, column by column",
            csc,
            _kept,
            lambda v: f"keep=sl.Magnitude({v['density']})",
            _DENSITY,
        ),
    )
}


def family_of(name: str) -> Family:
    """The family of this name, spelt as its function or as people say it ("local-stride").

    Raises `ValueError` with one line that lists the families.
    """
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower())
    for family in FAMILIES.values():
        spellings = (family.name, family.title)
        if plain in (re.sub(r"[^a-z0-9]", "", each.lower()) for each in spellings):
            return family
    raise ValueError(f"no family {name!r}; there are {', '.join(FAMILIES)}")
