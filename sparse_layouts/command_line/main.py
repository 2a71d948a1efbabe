"""The command line: its arguments, its exit codes, and what each command prints.

Exit codes: 0; 1 for a failure; 2 for a wrong command line; 130 for Ctrl-C; 141 where the reader of
the output has had enough.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_layouts.command_line.errors import CommandError, UsageError, need_package

PROGRAM = "python -m sparse_layouts"
DTYPES = ("float32", "float64", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog=PROGRAM, description="Structured sparse tensors for PyTorch."
    )
    top.add_argument("--version", action="store_true", help="print the version and leave")
    commands = top.add_subparsers(dest="command", metavar="{demo,info,explain,bench,doctor}")
    for add in (_add_demo, _add_info, _add_explain, _add_bench, _add_doctor):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    return top


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    demo = commands.add_parser(
        "demo",
        help="multiply and attend on real text, against dense torch; in under a minute",
        description="Block-sparse matmul and attention on real text: errors, times and memory "
        "against dense torch, as tables here and as an HTML report with pictures of the patterns.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("build/demo.html"),
        help="the report (default: %(default)s)",
    )
    demo.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: the GPU where there is one",
    )
    demo.add_argument(
        "--quick", action="store_true", help="a small case, a second or two; times mean nothing"
    )
    demo.set_defaults(run=run_demo)
    return demo


def _add_info(commands: Any) -> argparse.ArgumentParser:
    info = commands.add_parser(
        "info",
        help="print versions, devices, routes and kernels",
        description="Versions, devices, routes and kernels.",
    )
    info.set_defaults(run=run_info)
    return info


def _add_explain(commands: Any) -> argparse.ArgumentParser:
    explain = commands.add_parser(
        "explain",
        help="say which kernel an operation on a layout takes, and why",
        description="Which route and which kernels an operation takes, why not the others, and "
        "where there is none what densifying costs; from the tables, without running it.",
        epilog=f"example: {PROGRAM} explain attention local_stride seq_len=8192 num_heads=32 "
        "--dtype bfloat16 --gpu 9.0",
    )
    explain.add_argument(
        "operation",
        help="matmul, rmatmul (dense times layout), linear, softmax, sddmm, attention, or a "
        "function of one tensor such as torch.cumsum",
    )
    explain.add_argument("layout", help="a family of layouts: bsr, local_stride, nm, ...")
    explain.add_argument(
        "parameters", nargs="*", metavar="NAME=VALUE", help="its parameters; the others are usual"
    )
    explain.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    explain.add_argument(
        "--dense-columns", type=int, default=256, help="of the dense operand (default: %(default)s)"
    )
    explain.add_argument("--batch", type=int, default=1, help="of attention (default: %(default)s)")
    explain.add_argument(
        "--head-dim", type=int, default=64, help="of attention and sddmm (default: %(default)s)"
    )
    explain.add_argument("--gradients", action="store_true", help="also what backward will take")
    explain.add_argument(
        "--gpu",
        metavar="CAPABILITY",
        help="as if on an NVIDIA GPU of this compute capability, such as 9.0, which need not be "
        "there (default: this machine's CPU)",
    )
    explain.set_defaults(run=run_explain)
    return explain


def _add_bench(commands: Any) -> argparse.ArgumentParser:
    bench = commands.add_parser(
        "bench",
        help="measure against dense torch and the best rivals, below the ceiling",
        description="Runs the benchmarks of a source checkout: every row is compared with float64 "
        "first, then timed in turns with its rivals.",
    )
    bench.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="rows whose name contains NAME; repeatable",
    )
    bench.add_argument(
        "--device",
        choices=("all", "cpu", "cuda"),
        default="all",
        help="all: the CPU, and a GPU if there is one",
    )
    bench.add_argument("--threads", type=int, default=2, help="torch's threads on the CPU")
    bench.add_argument("--quick", action="store_true", help="small sizes: whether it runs at all")
    bench.add_argument("--list", action="store_true", help="print the rows' names and leave")
    bench.add_argument("--out", type=Path, help="a folder for the results as JSON and text")
    bench.set_defaults(run=run_bench)
    return bench


def _add_doctor(commands: Any) -> argparse.ArgumentParser:
    doctor = commands.add_parser(
        "doctor",
        help="say what is missing for which kernel, and how to get it",
        description="Which kernels can run on this machine, what the others lack and how to get "
        "it, which extras are missing, and whether every layout computes what dense torch does. "
        "Ends with 1 if something that should work does not.",
    )
    doctor.set_defaults(run=run_doctor)
    return doctor


def output_width() -> int | None:
    """The width of the terminal that is written to; None for a file or a pipe: lines stay whole."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_json(content: Any) -> None:
    """Prints JSON for a program to read."""
    print(json.dumps(content, indent=2))


def run_info(options: argparse.Namespace) -> int:
    """Prints versions, devices and both tables."""
    from sparse_layouts import info

    if options.json:
        print_json(info.collect())
    else:
        print(info.text(output_width()))
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """Runs the demo, prints its tables or JSON, writes its report."""
    import torch

    need_package("rich")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            "--device cuda: torch sees no CUDA device; leave --device out to use the CPU"
        )
    from sparse_layouts.command_line import demo, demo_report

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:  # now, not after half a minute of work
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()
    except OSError as error:
        raise CommandError(f"--out {options.out}: {error.strerror}") from error
    with demo_report.progress() as tell:
        result = demo.run(device, tell, quick=options.quick)
    options.out.write_text(demo_report.as_html(result), encoding="utf-8")
    if options.json:
        print_json({**result.as_json(), "report": str(options.out)})
    else:
        demo_report.show(result, options.out)
    return 0


def run_explain(options: argparse.Namespace) -> int:
    """Prints what `sl.explain` says of a call that is described in words."""
    from sparse_layouts.command_line import explain

    code, said = explain.explained(options)
    if options.json:
        print_json({"layout": code, **said.as_json()})
    else:
        print(f"layout: {code}")
        print(said.text(output_width()))
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Measures; 1 if a result was wrong."""
    from sparse_layouts.command_line import bench

    return bench.run(options, print_json)


def run_doctor(options: argparse.Namespace) -> int:
    """Examines this machine; 1 if something that should work does not."""
    from sparse_layouts.command_line import doctor

    found = doctor.examine()
    if options.json:
        print_json(found.as_json())
    else:
        print(found.text(output_width()))
    return 0 if found.is_well else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    own = parser()
    options = own.parse_args(arguments)
    if options.version:
        import sparse_layouts

        print(sparse_layouts.__version__)
        return 0
    if options.command is None:
        own.print_help(sys.stderr)
        return 2
    try:
        code = options.run(options)
        sys.stdout.flush()
    except CommandError as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code
