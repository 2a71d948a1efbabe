"""`python -m sparse_layouts doctor`: which kernels can run here, what the others lack, and whether
every layout computes what dense torch does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import sparse_layouts as sl
from sparse_layouts import info
from sparse_layouts.dispatch import Facts
from sparse_layouts.dispatch.kernel_table import KERNELS, Kernel, triton_version
from sparse_layouts.dispatch.text import folded, text_table
from sparse_layouts.measuring import relative_error
from sparse_layouts.viewing.extras import EXTRAS, pip_command

OLDEST_TORCH, OLDEST_TRITON, OLDEST_CAPABILITY = (2, 11), (3, 6), (8, 0)
CUDA_WHEELS = "https://pytorch.org/get-started/locally"


@dataclasses.dataclass
class Finding:
    """Something that is missing or wrong, how to mend it, and whether what should work does not."""

    what: str
    remedy: str
    is_broken: bool = False


@dataclasses.dataclass
class Row:
    """A kernel: whether it can run here, else what it lacks."""

    op: str
    kernel: str
    runs: bool
    lacks: str


@dataclasses.dataclass
class Check:
    """A call on a layout against dense torch: the relative error, or what was raised."""

    what: str
    device: str
    error: float | None
    limit: float
    raised: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the error is that of the dtype."""
        return self.error is not None and self.error <= self.limit


@dataclasses.dataclass
class Diagnosis:
    """What `examine` returns."""

    versions: dict[str, str]
    devices: list[dict[str, Any]]
    findings: list[Finding]
    kernels: list[Row]
    checks: list[Check]

    @property
    def is_well(self) -> bool:
        """Whether everything that should work here does."""
        return all(c.is_right for c in self.checks) and not any(f.is_broken for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "is_well": self.is_well,
            "versions": self.versions,
            "devices": self.devices,
            "findings": [dataclasses.asdict(f) for f in self.findings],
            "kernels": [dataclasses.asdict(k) for k in self.kernels],
            "checks": [{**dataclasses.asdict(c), "is_right": c.is_right} for c in self.checks],
        }

    def text(self, width: int | None = None) -> str:
        """All of it, for people."""
        rows = [[k.op, k.kernel, "yes" if k.runs else "no", k.lacks] for k in self.kernels]
        checks = [
            [
                c.what,
                c.device,
                "right" if c.is_right else "WRONG",
                c.raised or f"relative error {c.error:.1e}, at most {c.limit:.1e}",
            ]
            for c in self.checks
        ]
        parts = [
            text_table(("package", "version"), [list(i) for i in self.versions.items()]),
            "Kernels: which can run on this machine",
            text_table(("op", "kernel", "runs", "what it lacks"), rows, "  ", width),
            "Every layout used once and compared with dense torch",
            text_table(("call", "device", "", ""), checks, "  ", width),
        ]
        if self.findings:
            parts.append("What is missing, and how to get it")
            for each in self.findings:
                mark = "! " if each.is_broken else "- "
                lines = [f"{mark}{each.what}: {each.remedy}"]
                parts.append("\n".join(lines if width is None else folded(lines[0], width, "  ")))
        parts.append("All is well." if self.is_well else "Something that should work does not.")
        return "\n\n".join(parts)


def examine() -> Diagnosis:
    """Looks at what is installed, at every kernel's requirements, and uses every layout once.

    >>> from sparse_layouts.command_line import doctor
    >>> all(check.is_right for check in doctor.examine().checks)
    True
    """
    return Diagnosis(
        info.versions(),
        info.devices(),
        [*_torch_findings(), *_gpu_findings(), *_extra_findings()],
        list(_kernel_rows()),
        _checks(),
    )


# --- what is installed ----------------------------------------------------------------------------


def _torch_findings() -> Iterator[Finding]:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        yield Finding(
            f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}",
            "pip install --upgrade torch",
            is_broken=True,
        )
    if not torch.backends.mkl.is_available():
        yield Finding(
            "this torch is built without MKL, which multiplies n:m and CSR layouts by few columns",
            "other kernels take its place; torch's own wheels for x86 have it",
        )


def _gpu_findings() -> Iterator[Finding]:
    triton = triton_version()
    wanted = ".".join(map(str, OLDEST_TRITON))
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            yield Finding(
                "torch is a CPU build, so no GPU kernel runs",
                f"on a machine with an NVIDIA GPU, a CUDA build: {CUDA_WHEELS}",
            )
        elif shutil.which("nvidia-smi") is None:
            yield Finding(
                f"torch is built for CUDA {torch.version.cuda} and sees no device; nvidia-smi is "
                "not there either",
                "an NVIDIA GPU with its driver, for the GPU kernels",
            )
        else:
            yield Finding(
                f"torch is built for CUDA {torch.version.cuda} and sees no device, though there is "
                "a driver",
                "nvidia-smi shows the driver's CUDA version, which must be as new as torch's; "
                "CUDA_VISIBLE_DEVICES must not hide the device",
                is_broken=True,
            )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_CAPABILITY:
            yield Finding(
                f"cuda:{index} has compute capability {'.'.join(map(str, capability))}",
                "the Triton kernels need 8.0 or newer (A100, RTX 30); older GPUs compute densely",
            )
    on_gpu = torch.cuda.is_available()
    if not triton:
        yield Finding("Triton is not installed", "pip install triton", is_broken=on_gpu)
    elif triton[:2] < OLDEST_TRITON:
        yield Finding(
            f"Triton {'.'.join(map(str, triton))} is older than {wanted}",
            "pip install --upgrade triton (torch's release names the version that fits it)",
            is_broken=on_gpu,
        )
    if on_gpu and not torch.backends.cusparselt.is_available():
        yield Finding(
            "this torch has no cuSPARSELt, which multiplies 2:4 layouts by many columns",
            f"a CUDA build of torch with it: {CUDA_WHEELS}",
        )


def _extra_findings() -> Iterator[Finding]:
    for package, extra in EXTRAS.items():
        if importlib.util.find_spec(package) is None and package != "IPython":
            yield Finding(f"{package} (extra {extra}) is not installed", pip_command(package))


# --- kernels --------------------------------------------------------------------------------------


def _typical_facts(device: str, dtype: torch.dtype, **machine: Any) -> Iterator[Facts]:
    """Calls of all kinds and widths: a kernel that could take none of them cannot run here."""
    for columns, transposed, row_entries, edge, order in itertools.product(
        (1, 16, 64, 128, 512, 32768), (False, True), (16, 512), (64, 5), ("rows", "fragments")
    ):
        yield Facts(
            device,
            dtype,
            block_size=(edge, edge),
            head_dim=64,
            n_of_m=(2, 4),
            columns=columns,
            transposed=transposed,
            row_entries=row_entries,
            divisor=64,
            order=order,
            fragments=True,
            tma=device == "cuda",
            **machine,
        )


def _calls_here() -> list[Facts]:
    calls = []
    for dtype in (torch.float32, torch.bfloat16):
        calls += list(_typical_facts("cpu", dtype, triton=triton_version()))
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            machine = {
                "capability": torch.cuda.get_device_capability(index),
                "triton": triton_version(),
                "cusparselt": torch.backends.cusparselt.is_available(),
            }
            calls += list(_typical_facts("cuda", dtype, **machine))
    return calls


def _kernel_rows() -> Iterator[Row]:
    calls = _calls_here()
    # on a good GPU: what such a kernel would still say there is not what this machine lacks
    there = {"capability": (9, 0), "triton": (3, 6, 0), "cusparselt": True}
    on_gpu = [
        facts
        for dtype in (torch.float32, torch.bfloat16)
        for facts in _typical_facts("cuda", dtype, **there)
    ]
    for op, rows in sorted(KERNELS.rows.items()):
        for row in rows:
            runs = any(row.requires(facts) is None for facts in calls)
            yield Row(op, row.name, runs, "" if runs else _lack(row, calls, on_gpu))


def _lack(row: Kernel, calls: list[Facts], on_gpu: list[Facts]) -> str:
    """What this machine would have to have for the kernel to run."""
    fitting = next((facts for facts in on_gpu if row.requires(facts) is None), None)
    if fitting is None:
        return row.requires(calls[0]) or ""
    if not any(facts.device == "cuda" for facts in calls):
        return "a CUDA device" + ("" if triton_version() else " and Triton")
    here = next(facts for facts in calls if facts.device == "cuda")
    own = fitting._replace(
        capability=here.capability, triton=here.triton, cusparselt=here.cusparselt
    )
    return row.requires(own) or ""


# --- whether it computes --------------------------------------------------------------------------

WEIGHTS: dict[str, Callable[[torch.Tensor], sl.LayoutTensor]] = {
    "BSRTensor": lambda x: sl.bsr(x, 16, keep=sl.Magnitude(0.25)),
    "NMTensor": lambda x: sl.nm(x, 2, 4),
    "GroupedNMTensor": lambda x: sl.grouped_nm(x, 2, 4, 4),
    "ReorderedTensor": lambda x: sl.reorder(sl.bsr(x, 16, keep=sl.Magnitude(0.25)), 64),
    "CSRTensor": lambda x: sl.csr(x, keep=sl.Magnitude(0.1)),
    "CSCTensor": lambda x: sl.csc(x, keep=sl.Magnitude(0.1)),
}
MASKS: dict[str, Callable[[], sl.LayoutTensor]] = {
    "LocalStrideTensor": lambda: sl.local_stride(
        128, block_size=16, local_blocks=2, vert_stride=2, num_heads=2
    ),
    "BigBirdTensor": lambda: sl.without_counts(sl.bigbird(128, block_size=16, source="hf-eval")),
    "BSRTensor": lambda: sl.causal(128, block_size=64),
}


def _checks() -> list[Check]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    made = [_product(name) for name in WEIGHTS] + [_attention(name) for name in MASKS]
    # as models run it, which is what a Hopper GPU has a kernel of its own for
    made.append(_attention("BSRTensor", torch.bfloat16))
    return [_check(call, device) for call in made for device in devices]


Call = tuple[str, Callable[[str], torch.Tensor], torch.Tensor, torch.Tensor]


def _product(name: str) -> Call:
    """What is computed, how on a device, what dense torch finds, and what float64 does."""
    draw = torch.Generator().manual_seed(0)
    w = WEIGHTS[name](torch.randn(96, 96, generator=draw))
    x = torch.randn(96, 32, generator=draw)
    dense = w.to_dense()
    return (
        f"{name} @ x",
        lambda device: torch.matmul(w.to(device), x.to(device)),
        dense @ x,
        dense.double() @ x.double(),
    )


def _attention(name: str, dtype: torch.dtype = torch.float32) -> Call:
    draw = torch.Generator().manual_seed(0)
    mask = MASKS[name]()
    heads = mask.shape[0] if mask.dim() > 2 else 1
    q, k, v = (torch.randn(1, heads, 128, 32, generator=draw).to(dtype) for _ in range(3))
    attend, dense = F.scaled_dot_product_attention, mask.to_dense()
    return (
        f"attention, {name}" + ("" if dtype == torch.float32 else f", {str(dtype)[6:]}"),
        lambda on: attend(q.to(on), k.to(on), v.to(on), attn_mask=mask.to(on)),
        attend(q, k, v, attn_mask=dense),
        attend(q.double(), k.double(), v.double(), attn_mask=dense),
    )


def _check(call: Call, device: str) -> Check:
    what, compute, dense, exact = call
    # as the kernels are held to: twice what dense torch loses, and a few roundings
    limit = 2 * relative_error(dense, exact) + 4 * torch.finfo(dense.dtype).eps
    try:
        with sl.fallback("allow"):
            found = compute(device).cpu()
    except Exception as error:  # whatever goes wrong is what is asked for
        first = (str(error).strip().splitlines() or [""])[0]
        return Check(what, device, None, limit, f"{type(error).__name__}: {first}")
    return Check(what, device, relative_error(found, exact), limit)
