"""`python -m sparse_layouts demo` and `python -m sparse_layouts info`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "python -m sparse_layouts"


class CommandError(Exception):
    """What a user can mend: told in one line, without a traceback."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog=PROGRAM, description="Structured sparse tensors for PyTorch."
    )
    top.add_argument("--version", action="store_true", help="print the version and leave")
    commands = top.add_subparsers(dest="command", metavar="{demo,info}")
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
    demo.add_argument("--json", action="store_true", help="print JSON instead of tables")
    demo.add_argument(
        "--quick", action="store_true", help="a small case, a second or two; times mean nothing"
    )
    info = commands.add_parser(
        "info",
        help="print versions, devices, routes and kernels",
        description="Versions, devices, routes and kernels.",
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return top


def run_info(options: argparse.Namespace) -> None:
    """Prints versions, devices and both tables."""
    from sparse_layouts import info

    print(json.dumps(info.collect(), indent=2) if options.json else info.text())


def run_demo(options: argparse.Namespace) -> None:
    """Runs the demo, prints its tables or JSON, writes its report."""
    import torch

    try:
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        raise CommandError("needs the package rich: pip install 'sparse_layouts[cli]'") from error
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            "--device cuda: torch sees no CUDA device; leave --device out to use the CPU"
        )
    from sparse_layouts import demo, demo_report

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
        print(json.dumps({**result.as_json(), "report": str(options.out)}, indent=2))
    else:
        demo_report.show(result, options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for a failure, 2 for a wrong command line, 130 for Ctrl-C."""
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
        (run_demo if options.command == "demo" else run_info)(options)
        sys.stdout.flush()
    except CommandError as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
