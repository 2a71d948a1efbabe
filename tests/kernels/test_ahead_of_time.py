"""Every Triton kernel compiles without a GPU, in every configuration, and fits the machine.

`make test` compiles one configuration of each `@triton.jit` function that is launched (marker
`aot`), `make test-aot` the others (`aot_all`), under two versions of Triton.
"""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparse_layouts.dispatch.kernel_table import KERNELS
from sparse_layouts.kernels.ahead_of_time import Compilation
from tests.conftest import HAS_TRITON, INTERPRETED

FOLDER = Path(__file__).resolve().parent.parent.parent / "kernels"
# files whose kernels others launch
SHARED = ("triton_common", "triton_sequences", "hopper_common", "hopper_products", "hopper_rows")
PARTS = ("_kernel", "_load")
CAPABILITIES = (80, 90, 100)
FIRST_CAPABILITIES = (80, 90)
# of one program: NVIDIA's CUDA programming guide, technical specifications by compute capability
SHARED_MEMORY_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, which is for Linux only")


def module_names() -> list[str]:
    """Import names of all files that launch Triton or Gluon kernels."""
    files = sorted([*FOLDER.rglob("triton_*.py"), *FOLDER.rglob("hopper_*.py")])
    return [
        ".".join(("sparse_layouts.kernels", *file.relative_to(FOLDER).with_suffix("").parts))
        for file in files
        if file.stem not in SHARED and not file.stem.endswith(PARTS)
    ]


@functools.cache
def compilations_of(name: str) -> tuple[Compilation, ...]:
    """A module's configurations, the most used one first; none where it lists none."""
    listed = getattr(importlib.import_module(name), "compilations", None)
    return tuple(listed()) if listed is not None else ()


def capabilities_of(compilation: Compilation) -> list[int]:
    """Those that a configuration is compiled for: the usual ones that it admits, and its own first
    one, which may be another (89: tensor cores that multiply e4m3).
    """
    first, last = compilation.min_capability, compilation.max_capability
    return sorted({first, *(c for c in CAPABILITIES if first <= c <= last)})


def every_compilation(first: bool) -> list[Any]:
    """(configuration, capability): with `first`, the first of each function that the capability
    admits, else the others.
    """
    if not HAS_TRITON or INTERPRETED:
        return []
    params = []
    for name in module_names():
        for capability in SHARED_MEMORY_BYTES:
            seen = set()
            for compilation in compilations_of(name):
                if capability not in capabilities_of(compilation):
                    continue
                is_first = compilation.kernel not in seen and capability in FIRST_CAPABILITIES
                seen.add(compilation.kernel)
                if is_first == first:
                    label = f"{name.rpartition('.')[2]}-{compilation.name}-sm{capability}"
                    params.append(pytest.param(compilation, capability, id=label))
    return params


def compile_and_check(compilation: Compilation, capability: int) -> str:
    """The PTX of a configuration; AssertionError where a program takes more shared memory than it
    can have.
    """
    compiled = compilation.compile(capability)
    taken, there = compiled.metadata.shared, SHARED_MEMORY_BYTES[capability]
    assert taken <= there, f"{compilation.name}: {taken} bytes of shared memory, of {there}"
    return compiled.asm["ptx"]


def check_tensor_cores(compilation: Compilation, ptx: str) -> None:
    """On Hopper products in 16 and 8 bits go through wgmma: `mma.sync` reaches little more than
    half of its speed.
    """
    fast = ("*bf16", "*fp16", "*fp8e4nv")
    is_fast = any(kind in fast for kind in compilation.signature.values())
    by_warp = "mma.sync" in ptx
    assert not (is_fast and by_warp), f"{compilation.name}: products by warp, not by warpgroup"


@pytest.mark.aot
@pytest.mark.parametrize(("compilation", "capability"), every_compilation(first=True))
def test_first_configuration_compiles(compilation: Compilation, capability: int) -> None:
    ptx = compile_and_check(compilation, capability)
    if capability == 90:
        check_tensor_cores(compilation, ptx)


@pytest.mark.aot_all
@pytest.mark.parametrize(("compilation", "capability"), every_compilation(first=False))
def test_configuration_compiles(compilation: Compilation, capability: int) -> None:
    compile_and_check(compilation, capability)


# --- nothing is left out --------------------------------------------------------------------------


def launched_kernels(module: ModuleType) -> set[str]:
    """Names that the module's code launches: `name[grid](...)` or `PassLaunch(name, ...)`, where
    `name` is a jit function of the module.
    """
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    launched = [call.func.value for call in calls if isinstance(call.func, ast.Subscript)]
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id in ("PassLaunch", "Launch"):
            launched += call.args[:1]
    names = {value.id for value in launched if isinstance(value, ast.Name)}
    return {name for name in names if hasattr(getattr(module, name, None), "arg_names")}


@needs_triton
@pytest.mark.parametrize("name", module_names())
def test_every_module_lists_configurations(name: str) -> None:
    module = importlib.import_module(name)
    assert hasattr(module, "compilations"), f"{name} has no compilations(), nor is it of {SHARED}"
    assert compilations_of(name), f"{name}.compilations() is empty"


@needs_triton
@pytest.mark.parametrize("name", module_names())
def test_every_launched_kernel_is_listed(name: str) -> None:
    # a kernel may be listed in the file that defines it and launched by another
    listed = {c.kernel.__name__ for other in module_names() for c in compilations_of(other)}
    launched = launched_kernels(importlib.import_module(name))
    assert launched <= listed, f"{name} launches {launched - listed}: no compilations() lists it"


@needs_triton
def test_launches_are_found() -> None:
    found = [launched_kernels(importlib.import_module(name)) for name in module_names()]
    assert sum(map(len, found)) >= len({row.op for of_op in KERNELS.rows.values() for row in of_op})


@needs_triton
@pytest.mark.parametrize("name", module_names())
def test_names_of_configurations_differ(name: str) -> None:
    names = [compilation.name for compilation in compilations_of(name)]
    assert len(names) == len(set(names)), [n for n in names if names.count(n) > 1]


@needs_triton
@pytest.mark.parametrize("name", module_names())
def test_configurations_name_every_argument(name: str) -> None:
    for compilation in compilations_of(name):
        assert list(compilation.signature) == list(compilation.kernel.arg_names), compilation.name
        constant = {n for n, kind in compilation.signature.items() if kind == "constexpr"}
        assert constant == set(compilation.constexprs), compilation.name
        assert compilation.min_capability in SHARED_MEMORY_BYTES, compilation.name


def test_every_triton_row_is_compiled() -> None:
    modules = {row.source.partition(":")[0] for of_op in KERNELS.rows.values() for row in of_op}
    own = ("triton_", "hopper_")
    triton_modules = {name for name in modules if name.rpartition(".")[2].startswith(own)}
    assert triton_modules
    assert triton_modules <= set(module_names())


# --- the check can fail ---------------------------------------------------------------------------


def squared(size: int, num_warps: int = 4) -> Compilation:
    """The product of small_kernels."""
    from tests.kernels.small_kernels import product

    signature = {"x_ptr": "*bf16", "steps": "i32", "N": "constexpr"}
    constexprs, options = {"N": size}, {"num_warps": num_warps}
    return Compilation("squared", product, signature, constexprs, options)


@pytest.mark.aot
def test_a_broken_kernel_is_red() -> None:
    from triton.compiler.errors import CompilationError

    from tests.kernels.small_kernels import does_not_compile

    signature = {"x_ptr": "*bf16", "N": "constexpr"}
    broken = Compilation("broken", does_not_compile, signature, {"N": 32}, {})
    with pytest.raises(CompilationError):
        compile_and_check(broken, 90)


@pytest.mark.aot
def test_too_much_shared_memory_is_red() -> None:
    assert "wgmma.mma_async" in compile_and_check(squared(64), 90)
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        compile_and_check(squared(256, num_warps=32), 80)


@pytest.mark.aot
def test_products_by_warp_are_red() -> None:
    small = squared(32)  # fewer than the 64 rows that a warpgroup multiplies
    with pytest.raises(AssertionError, match="by warp"):
        check_tensor_cores(small, compile_and_check(small, 90))
