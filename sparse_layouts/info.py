"""`python -m sparse_layouts info`: versions, devices and both tables, also for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import sparse_layouts
from sparse_layouts.dispatch import table
from sparse_layouts.dispatch.kernel_table import KERNELS
from sparse_layouts.dispatch.text import readable_bytes, text_table

PACKAGES = ("torch", "triton", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Versions of Python, this library and what it stands on, or "not installed"."""
    found = {"python": platform.python_version(), "sparse_layouts": sparse_layouts.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # with its build, such as +cpu
    return found


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """How many programs ran at once over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def disturbance(load: float | None) -> str:
    """A warning if other programs used the cores before measuring, else ""."""
    if load is None or load < 0.5:
        return ""
    return f"load average {load:.1f} on {cores()} cores before: other programs disturb the times"


def devices() -> list[dict[str, Any]]:
    """The CPU with its threads, every CUDA device with compute capability and memory in bytes."""
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": cpu_name(), "cores": cores(), "threads": torch.get_num_threads()}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            own = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": own.name,
                    "capability": [own.major, own.minor],
                    "memory_bytes": own.total_memory,
                }
            )
    return found


def collect() -> dict[str, Any]:
    """All that the command says, as JSON can hold it."""
    both = table()
    return {
        "versions": versions(),
        "devices": devices(),
        "routes": [
            {"function": function, "operands": operands, "handler": handler}
            for function, operands, handler in both._routes()
        ],
        "kernels": {
            op: [{"kernel": row.name, "source": row.source} for row in rows]
            for op, rows in sorted(KERNELS.rows.items())
        },
    }


def _device_text(device: dict[str, Any]) -> str:
    if device["device"] == "cpu":
        return f"{device['cores']} cores, torch uses {device['threads']} threads"
    capability = ".".join(map(str, device["capability"]))
    return f"compute capability {capability}, {readable_bytes(device['memory_bytes'])}"


def text(width: int | None = None) -> str:
    """All that the command says, its tables at most `width` wide; None: as wide as they are."""
    rows = [[d["device"], d["name"], _device_text(d)] for d in devices()]
    if len(rows) == 1:
        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees none"
        rows.append(["cuda", "none", why])
    return "\n\n".join(
        [
            text_table(("package", "version"), [list(item) for item in versions().items()]),
            text_table(("device", "name", "what it has"), rows, width=width),
            table().text(width),
        ]
    )
