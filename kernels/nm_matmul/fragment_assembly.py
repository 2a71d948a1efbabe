"""The PTX that multiplies fragments: instructions that Gluon has no name for.

Every function returns the text of one block for :func:`gl.inline_asm_elementwise` with `pack=8`:
operands are tensors of eight 32-bit registers a thread, `$0`.. those of the first result, then the
other results and the arguments in order. Lane `4 g + t`; words and bits as in
`sparse_layouts/nm_fragments.py`.

Source: PTX ISA 8.5, "Warp-level matrix instructions", `prmt`, `lop3`.
"""

from __future__ import annotations

from triton.experimental import gluon

# prmt: the signs of the two bytes of row g, of row g + 8, each spread over a half
SIGNS = ("0x9988", "0xBBAA")


@gluon.constexpr_function
def operands(results: str, number: int, *inputs: object) -> str:
    """Constraints of `number` results of eight registers and, in turn, of kinds and numbers of
    arguments.
    """
    kinds = [results] * (8 * number)
    for kind, count in zip(inputs[::2], inputs[1::2], strict=True):
        kinds += [str(kind)] * (8 * int(count))  # type: ignore[call-overload]
    return ",".join(kinds)


@gluon.constexpr_function
def _four(first: int, number: int = 4) -> str:
    return "{" + ", ".join(f"${i}" for i in range(first, first + number)) + "}"


@gluon.constexpr_function
def products(of: int, place: int, width: int, kind: str) -> str:
    """Sums: results sums 8; arguments the sparse operand 8 (of m = 8 8 + 8), metadata 8 (one used),
    x 8 (of m = 8 8 + 8) `width` times, sums 8.

    `of` 2: entries of 2:4, else m; `place`: which lanes have the metadata (2:4: unused). `width` 2:
    sums of 8 columns of the output each; 1: two parts of the sums of one, so that a product does
    not wait for the one before.
    """
    steps, tensors = (2, 1) if of == 2 else (of // 2, of // 4)
    metadata = 8 + 8 * tensors
    x = metadata + 8
    sums = x + 8 * tensors * width
    lines = []
    for step in range(steps):
        for j in range(width):
            to = 4 * j if width == 2 else 4 * (step % 2)
            begun = step >= 3 - width
            own = x + 8 * tensors * j
            right = ", ".join(f"${own + k}" for k in _x_words(of, step))
            selector = step if of == 2 else place
            lines.append(
                f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
                f"{_four(to)}, {_four(8 + 4 * step)}, {{{right}}}, "
                f"{_four(to if begun else sums + to)}, ${metadata}, {selector:#x};"
            )
    return "\n".join(lines)


@gluon.constexpr_function
def _x_words(of: int, step: int) -> list[int]:
    """Which words of x are a step's: of 64 columns, of m = 8 of 128."""
    if of == 2:
        return [4 * step + k for k in range(4)]
    return [of // 2 * k + step for k in range(4)]


@gluon.constexpr_function
def expansion(of: int, place: int) -> str:
    """The sparse operand of four words of entries, those of q = `place`: of each a word for every
    two columns of a group, where entries of others are masked out; results 8 words, of m = 8 8 + 8,
    arguments entries 8, positions 8 (one used).

    A mask is made of a higher bit of both positions.
    """
    first = 2 * of
    words = f"${first + 8}"
    lines: list[str] = []
    made = 0
    for i in range(2):
        sources = []  # the words with the first, of m = 8 the second bit in a byte's sign
        for plane in range(of // 4):
            shift = 2 * (2 * place + i) + plane
            sources.append(f"r{made}")
            lines.append(f"shl.b32 r{made}, {words}, {shift};")
            made += 1
        for r in range(2):
            masks = []
            for source in sources:
                masks.append(f"r{made}")
                lines.append(f"prmt.b32 r{made}, {source}, {source}, {SIGNS[r]};")
                made += 1
            entry = f"${first + 4 * place + 2 * i + r}"
            for step in range(of // 2):
                table = 0xF0 & (0xCC if step & 1 else 0x33)
                if of == 8:
                    table &= 0xAA if step & 2 else 0x55
                to = f"${4 * step + 2 * i + r}"
                lines.append(f"lop3.b32 {to}, {entry}, {masks[0]}, {masks[-1]}, {table:#x};")
    return "{\n.reg .b32 r<" + str(made) + ">;\n" + "\n".join(lines) + "\n}"
