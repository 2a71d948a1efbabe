"""The PTX that multiplies fragments: instructions that Gluon has no name for.

Every function returns the text of one block for :func:`gl.inline_asm_elementwise` with `pack=8`:
operands are tensors of eight 32-bit registers a thread, `$0`.. those of the first result, then the
other results and the arguments in order. Lane `4 g + t`; words and bits as in
`sparse_layouts/nm_fragments.py`.

Source: PTX ISA 8.5, "Warp-level matrix instructions", `prmt`, `lop3`.
"""

from __future__ import annotations

import itertools

from triton.experimental import gluon

LOW, HIGH = "0x5410", "0x7632"  # prmt: the low halves of two words, the high ones
# prmt: the signs of the two bytes of row g, of row g + 8, each spread over a half
SIGNS = ("0x9988", "0xBBAA")
# of an expansion: the first registers of its arguments
ENTRIES, WORDS, TOPS = 16, 24, 32


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
def sparse_products(width: int, kind: str) -> str:
    """Sums of 2:4: results sums 8; arguments entries 8, metadata 8 (one used), x 8 (width times),
    sums 8.

    `width` 2: sums of 8 columns of the output each; 1: two parts of the sums of one, so that a
    product does not wait for the one before.
    """
    sums = 24 + 8 * width
    lines = []
    for step in range(2):
        for j in range(width):
            to = 4 * j if width == 2 else 4 * step
            begun = step > 0 and width == 2
            lines.append(
                f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
                f"{_four(to)}, {_four(8 + 4 * step)}, {_four(24 + 8 * j + 4 * step)}, "
                f"{_four(to if begun else sums + to)}, $16, 0x{step};"
            )
    return "\n".join(lines)


@gluon.constexpr_function
def dense_products(width: int, kind: str) -> str:
    """Sums of a dense operand: results sums 8; arguments the operand 8 + 8, x 8 (width times), sums
    8, as in :func:`sparse_products`.
    """
    sums = 24 + 8 * width
    lines = []
    for step in range(4):
        for j in range(width):
            to = 4 * j if width == 2 else 4 * (step % 2)
            begun = step >= 3 - width
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
                f"{_four(to)}, {_four(8 + 4 * step)}, {_four(24 + 8 * j + 2 * step, 2)}, "
                f"{_four(to if begun else sums + to)};"
            )
    return "\n".join(lines)


@gluon.constexpr_function
def pairing(of: int) -> str:
    """Words of x with one column of two groups each; results and arguments 8 words."""
    first, second = ((0, 1, 4, 5), (2, 3, 6, 7)) if of == 4 else ((0, 1, 2, 3), (4, 5, 6, 7))
    lines = []
    for i, u, v in zip(range(4), first, second, strict=True):
        lines.append(f"prmt.b32 ${2 * i}, ${8 + u}, ${8 + v}, {LOW};")
        lines.append(f"prmt.b32 ${2 * i + 1}, ${8 + u}, ${8 + v}, {HIGH};")
    return "\n".join(lines)


@gluon.constexpr_function
def expansion(stored: int, of: int, chunk: int) -> str:
    """The dense operand of 64 columns of a unit, 8 + 8 words; arguments entries 8, positions 8 and,
    of groups of 8, high bits 8 (one used of each).

    For every column of a group a word of what two groups have there: the word of their entries,
    where each is not of this column masked out. A mask is made of a bit of both positions.
    """
    shifted: dict[tuple[int, int], str] = {}  # (register, bits to the left): name
    lines: list[str] = []

    def fresh() -> str:
        return f"r{len(lines)}"

    def mask(word: int, shift: int, r: int) -> str:
        source = f"${word}"
        if shift:
            if (word, shift) not in shifted:
                shifted[word, shift] = fresh()
                lines.append(f"shl.b32 {shifted[word, shift]}, {source}, {shift};")
            source = shifted[word, shift]
        name = fresh()
        lines.append(f"prmt.b32 {name}, {source}, {source}, {SIGNS[r]};")
        return name

    def masked(word: str, low: str, high: str, place: int, to: str | None = None) -> str:
        """The word where the two bits are those of the place."""
        to = fresh() if to is None else to
        table = 0xF0 & (0xAA if place & 1 else 0x55) & (0xCC if place & 2 else 0x33)
        lines.append(f"lop3.b32 {to}, {word}, {high}, {low}, {table:#x};")
        return to

    if of == 4:
        for half, r in itertools.product(range(2), range(2)):
            c = 2 * chunk + half
            low, high = mask(WORDS, 2 * c, r), mask(WORDS, 2 * c + 1, r)
            for place in range(4):
                masked(f"${ENTRIES + 2 * c + r}", low, high, place, _result(half, place, r))
        return _block(lines)
    for r in range(2):
        found: dict[tuple[int, int], list[str]] = {}  # (half of the group, place in it): words
        for c in [chunk] if stored == 1 else [2 * chunk, 2 * chunk + 1]:
            low, high = mask(WORDS, 2 * c, r), mask(WORDS, 2 * c + 1, r)
            top = mask(TOPS, c, r)
            for half, table in enumerate(("0x30", "0xc0")):  # not top, top
                word = fresh()
                entries = f"${ENTRIES + 2 * c + r}"
                lines.append(f"lop3.b32 {word}, {entries}, {top}, {top}, {table};")
                for place in range(4):
                    to = _result(half, place, r) if stored == 1 else None
                    made = masked(word, low, high, place, to)
                    found.setdefault((half, place), []).append(made)
        if stored == 2:
            for at, made_of in found.items():
                lines.append(f"or.b32 {_result(*at, r)}, {', '.join(made_of)};")
    return _block(lines)


@gluon.constexpr_function
def _block(lines: list[str]) -> str:
    return "{\n.reg .b32 r<" + str(len(lines) + 1) + ">;\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _result(half: int, place: int, r: int) -> str:
    """Where the word of a place belongs: of two m16n8k16 operands, row g, row g + 8, and again."""
    return f"${8 * half + 2 * place + r}"
