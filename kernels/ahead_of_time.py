"""Compiling a Triton kernel without a GPU: what a kernel's file lists so that every configuration
can be checked anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Compilation(NamedTuple):
    """One configuration of one `@triton.jit` or `@gluon.jit` function.

    A file that launches kernels has `compilations()`, which yields these, the most used one first.
    `signature` names the type of every argument (`"*bf16"`, `"i32"`, `"fp32"`, `"constexpr"`),
    `constexprs` the values of the constant ones, `options` what the launcher passes besides
    (`num_warps`, `num_stages`). `min_capability` and `max_capability`: the first and the last of
    80, 89, 90 and 100 that are launched with it (89 is compiled for where it is the first).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    min_capability: int = 80
    max_capability: int = 100

    def compile(self, capability: int) -> Any:
        """Compiles for one compute capability (80, 89, 90, 100); returns Triton's compiled kernel
        (`.asm`, `.metadata`).
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        if self.kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
        source = ASTSource(self.kernel, self.signature, self.constexprs)
        return triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=self.options
        )
