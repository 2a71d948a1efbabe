"""The results that `make bench` writes, read from their JSON: what was measured, and where.

Read by field, not by the names of rows, so that results of any benchmark fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sparse_layouts


class Result(NamedTuple):
    """One measured row; times in seconds, rates in FLOP/s of the stored part of the work.

    `ratios` says how many times faster it is than each rival. `where` names the machine and the
    versions. None: not told.
    """

    name: str
    device: str
    density: float | None
    seconds: float | None
    flops: float | None
    ceiling_flops: float | None
    ratios: dict[str, float]
    holds: bool | None
    notes: tuple[str, ...]
    where: str
    file: str
    share: float | None = None
    share_of: str = ""

    @property
    def of_ceiling(self) -> float | None:
        """The share of the ceiling's rate that the stored part of the work ran at; where a row has
        another measure of that (`share_of`), this.
        """
        if not self.flops or not self.ceiling_flops:
            return self.share
        return self.flops / self.ceiling_flops

    @property
    def machine(self) -> str:
        """The device's name, without the versions."""
        return self.where.split(",")[0]

    @property
    def drawn(self) -> bool:
        """Whether `sl.roofline` has a place for it."""
        return bool(self.density and (self.flops or self.over_dense))

    @property
    def over_dense(self) -> float | None:
        """How many times faster than the dense rival; None where there is none."""
        return next((r for name, r in self.ratios.items() if "dense" in name.lower()), None)


def results_folder() -> Path:
    """Where a source checkout keeps its results. Raises `FileNotFoundError` in an installed
    library, which has none.
    """
    root = Path(sparse_layouts.__file__).resolve().parent.parent
    folder = root / "benchmarks" / "results"
    if not folder.is_dir():
        raise FileNotFoundError(
            "no benchmark results beside an installed library; give a folder or file that "
            "`make bench` or `python -m sparse_layouts bench --out` wrote"
        )
    return folder


def read_results(source: str | Path | Iterable[str | Path] | None = None) -> list[Result]:
    """All measured rows of JSON files, or of those in folders; of a checkout's own by default.

    Raises `FileNotFoundError` for what is not there and `ValueError` that names the file for what
    holds no results.

    >>> from sparse_layouts.viewing.benchmark_results import read_results
    >>> any(row.over_dense for row in read_results())  # of a source checkout
    True
    """
    if source is None:
        source = results_folder()
    given = [source] if isinstance(source, (str, Path)) else list(source)
    files: list[Path] = []
    for each in map(Path, given):
        if not each.exists():
            raise FileNotFoundError(f"no benchmark results at {each}")
        files += sorted(each.glob("*.json")) if each.is_dir() else [each]
    if not files:
        raise FileNotFoundError(f"no .json file in {', '.join(map(str, given))}")
    return [row for file in files for row in _rows_of(file)]


def _rows_of(file: Path) -> list[Result]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        where = _where(content)
        rows = [_row(row, where, file.name) for row in content["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: no benchmark results ({type(error).__name__}: {error})"
        ) from None
    return [row for row in rows if row is not None]


def _where(content: dict[str, Any]) -> str:
    devices = content["devices"]
    names = [d["name"] for d in devices if str(d["device"]).startswith("cuda")]
    versions = content["versions"]
    if not names:
        names = [f"{devices[0]['name']}, {content.get('threads', '?')} threads"]
    parts = [names[0], f"torch {versions['torch']}", f"Triton {versions['triton']}"]
    return ", ".join([*parts, str(content["date"])[:10]])


def _row(row: dict[str, Any], where: str, file: str) -> Result | None:
    timing = row["timing"]
    if timing is None or row.get("wrong"):
        return None  # left out, or its result was wrong: no number
    seconds = float(timing["median_s"])
    if not math.isfinite(seconds):
        raise ValueError(f"{row['name']}: a time of {seconds}")
    return Result(
        str(row["name"]),
        str(row.get("device", "")),
        row.get("density"),
        seconds,
        row.get("flops"),
        row.get("ceiling_flops"),
        {str(k): float(v) for k, v in (row.get("ratios") or {}).items()},
        row.get("holds"),
        tuple(row.get("notes") or ()),
        where,
        file,
        row.get("share"),
        str(row.get("share_of") or ""),
    )


def named(rows: Iterable[Result], part: str) -> list[Result]:
    """The rows whose name or file contains `part`, in any case; of several words, each."""
    words = part.lower().split()
    return [row for row in rows if all(w in f"{row.name} {row.file}".lower() for w in words)]
