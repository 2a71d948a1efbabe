"""What the demo shows: progress, tables in the terminal, an HTML page with pictures."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Iterator
from pathlib import Path

from sparse_layouts import info
from sparse_layouts.command_line.demo import Part, Result, Tell
from sparse_layouts.dispatch.text import html_table, readable_bytes
from sparse_layouts.measuring import Timing

Table = tuple[tuple[str, ...], list[list[str]]]
STAGES = 10  # the calls of `tell` in demo.run


def seconds(timing: Timing) -> str:
    """ "12.3 ms (11.9-12.8)": the median and the quartiles."""
    median, low, high = timing[:3]
    unit, scale = next(
        ((u, s) for u, s in (("s", 1.0), ("ms", 1e3)) if median * s >= 1), ("us", 1e6)
    )
    return f"{median * scale:.3g} {unit} ({low * scale:.3g}-{high * scale:.3g})"


def verdict(ratio: float) -> str:
    """In words, whichever way it goes."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def error_table(part: Part) -> Table:
    """Errors against float64."""
    rows = [[e.what, f"{e.sparse:.1e}", f"{e.dense:.1e}"] for e in part.errors]
    return (f"relative error against float64, {part.dtype}", "sparse", "dense"), rows


def time_table(part: Part) -> Table:
    """Times, and who wins."""
    rows = [[t.what, seconds(t.sparse), seconds(t.dense), verdict(t.ratio)] for t in part.times]
    return ("time, median (quartiles)", "sparse", "dense", "sparse is"), rows


def memory_table(part: Part) -> Table:
    """Bytes."""
    rows = [[what, readable_bytes(count)] for what, count in part.memory_bytes.items()]
    return ("memory", ""), rows


def fact_table(part: Part) -> Table:
    """Shares of the whole."""
    rows = [["density: stored entries over all", f"{part.density:.2%}"]]
    if part.density_of_causal is not None:
        rows.append(["stored entries over those of a causal mask", f"{part.density_of_causal:.2%}"])
    rows += [[what, f"{value:.2%}"] for what, value in part.facts.items()]
    return ("pattern", ""), rows


def tables(part: Part) -> list[Table]:
    """All of a part's tables."""
    return [fact_table(part), error_table(part), time_table(part), memory_table(part)]


def disturbed(result: Result) -> str:
    """A warning where the times mean little, else ""."""
    return info.disturbance(result.load_average)


def machine(result: Result) -> str:
    """One line on where the numbers come from."""
    v = result.versions
    plural = "" if result.threads == 1 else "s"
    threads = f", {result.threads} thread{plural}" if result.device == "cpu" else ""
    return (
        f"{result.device_name}{threads}; Python {v['python']}, torch {v['torch']}, "
        f"Triton {v['triton']}, sparse_layouts {v['sparse_layouts']}; {result.seconds:.0f} s"
    )


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """Shows on stderr what is being done: a bar in a terminal, a line a stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        begin = time.perf_counter()

        def tell_line(stage: str) -> None:
            console.print(f"{time.perf_counter() - begin:5.1f} s  {stage}", soft_wrap=True)

        yield tell_line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=STAGES)
        started = False

        def tell(stage: str) -> None:
            nonlocal started
            bar.update(task, description=stage, advance=1 if started else 0)
            started = True

        yield tell


def show(result: Result, report: Path) -> None:
    """Prints the tables, and where the page is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    for part in result.parts:
        console.print()
        console.rule(f"[bold]{escape(part.title)}", align="left")
        console.print(escape(part.about))
        console.print(f"[dim]{escape(part.layout)}")
        for head, rows in tables(part):
            table = RichTable(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
            for i, name in enumerate(head):
                table.add_column(escape(name), no_wrap=i > 0)
            for row in rows:
                table.add_row(*map(escape, row))
            console.print()
            console.print(table)
        console.print()
        console.print(escape(repr(part.explanation)), soft_wrap=True)
    console.print()
    console.print(f"[dim]{escape(machine(result))}")
    if disturbed(result):
        console.print(f"[yellow]{escape(disturbed(result))}")
    console.print(f"With pictures of both patterns: {escape(str(report))}", soft_wrap=True)


_STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #666; --good: #1a7f37; --bad: #b35900; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #aaa; --good: #5fd17f; --bad: #f0a050; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p.soft, footer { color: var(--soft); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.5rem .25rem 0; }
th, td { border-bottom: 1px solid var(--line); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; margin: .5rem 0; }
code { font-size: 13px; } .faster { color: var(--good); } .slower { color: var(--bad); }
figure { margin: 1.5rem 0; overflow-x: auto; } details > div { overflow-x: auto; font-size: 13px; }
"""


def _part_as_html(part: Part) -> str:
    pieces = [f"<h2>{html.escape(part.title)}</h2>", f"<p>{html.escape(part.about)}</p>"]
    verdicts = []
    for each in part.times:
        kind = "faster" if each.ratio >= 1 else "slower"
        text = f"{each.what}: sparse is {verdict(each.ratio)} than dense"
        verdicts.append(f'<li class="{kind}">{html.escape(text)}</li>')
    pieces.append(f"<ul>{''.join(verdicts)}</ul>")
    pieces.append(f"<p><code>{html.escape(part.layout)}</code></p>")
    pieces.append(f"<figure>{part.picture}</figure>")
    pieces += [html_table(head, rows) for head, rows in tables(part)]
    pieces.append(
        "<details open><summary>Which kernel, and why: what <code>sl.explain</code> says</summary>"
        f"{part.explanation._repr_html_()}</details>"
    )
    return "\n".join(pieces)


def as_html(result: Result) -> str:
    """The page: one file, no script, nothing loaded from elsewhere."""
    body = "\n".join(_part_as_html(part) for part in result.parts)
    warning = disturbed(result)
    if warning:
        body = f'<p class="slower">{html.escape(warning)}</p>\n{body}'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sparse_layouts: demo</title><style>{_STYLE}</style></head><body>\n"
        "<h1>sparse_layouts: block-sparse against dense, on real text</h1>\n"
        f'<p class="soft">{html.escape(machine(result))}</p>\n{body}\n'
        "<footer><p>Made by <code>python -m sparse_layouts demo</code>.</p></footer>"
        "</body></html>\n"
    )
