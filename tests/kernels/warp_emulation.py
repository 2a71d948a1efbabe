"""A warp that runs the blocks of PTX that the kernels write: enough of the ISA for fragments.

From the PTX ISA's own definitions (8.5: `prmt`, `lop3`, "Matrix fragments for mma.m16n8k16",
"... for sparse mma.m16n8k32"), in numpy, a row for every lane.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def run(text: str, results: int, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results of a block, each uint32 or float32 (32, 8), from arguments likewise."""
    registers: dict[str, np.ndarray] = {}
    for i, argument in enumerate(arguments):
        for j in range(8):
            registers[f"${8 * (results + i) + j}"] = argument[:, j]
    for line in re.split(r"[;\n]", text):
        words = line.split(None, 1)
        if len(words) == 2 and not words[0].startswith("."):
            _step(words[0], _operands(words[1]), registers)
    return [np.stack([registers[f"${8 * i + j}"] for j in range(8)], 1) for i in range(results)]


def _operands(text: str) -> list[list[str]]:
    """Each a list: of one register or number, or of those in braces."""
    found = re.findall(r"\{([^}]*)\}|([^,\s]+)", text)
    return [[r.strip() for r in (braced or single).split(",")] for braced, single in found]


def _step(name: str, operands: list[list[str]], registers: dict[str, np.ndarray]) -> None:
    def value(which: int, place: int = 0) -> np.ndarray:
        text = operands[which][place]
        if text in registers:
            return registers[text]
        return np.full(32, int(text, 0), np.uint32)

    to = operands[0]
    if name.startswith("mma"):
        sparse = name.startswith("mma.sp")
        a, b, c = ([value(k, j) for j in range(len(operands[k]))] for k in (1, 2, 3))
        kind = name.split(".")[-2]
        if sparse:
            left = sparse_operand(a, value(4), int(operands[5][0], 0), kind)
        else:
            left = dense_operand(a, kind)
        product = left @ right_operand(b, kind)
        for j in range(4):
            row, column = G + 8 * (j // 2), 2 * T + j % 2
            registers[to[j]] = (c[j] + product[row, column]).astype(np.float32)
    elif name == "prmt.b32":
        registers[to[0]] = permuted(value(1), value(2), value(3))
    elif name == "lop3.b32":
        registers[to[0]] = looked_up(value(1), value(2), value(3), int(operands[4][0], 0))
    elif name == "shl.b32":
        registers[to[0]] = (value(1).astype(np.uint64) << value(2)).astype(np.uint32)
    elif name == "or.b32":
        registers[to[0]] = value(1) | value(2)
    else:
        raise NotImplementedError(name)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: bytes of a (0..3) and b (4..7); 8 more: the byte's sign, eight times."""
    out = np.zeros(32, np.uint32)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        byte = np.where(nibble >= 8, np.where(byte >= 128, 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """lop3: bit by bit from a table of eight bits, by a, b and c."""
    out = np.zeros(32, np.uint32)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def halves(word: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The two numbers of a word."""
    low, high = (word & np.uint32(0xFFFF), word >> np.uint32(16))
    if kind == "bf16":
        return (low << np.uint32(16)).view(np.float32), (high << np.uint32(16)).view(np.float32)
    return tuple(h.astype(np.uint16).view(np.float16).astype(np.float32) for h in (low, high))  # type: ignore[return-value]


def dense_operand(a: list[np.ndarray], kind: str) -> np.ndarray:
    """A (16, 16) of m16n8k16."""
    out = np.zeros((16, 16), np.float64)
    for i, word in enumerate(a):
        row, column = G + 8 * (i % 2), 2 * T + 8 * (i // 2)
        out[row, column], out[row, column + 1] = halves(word, kind)
    return out


def sparse_operand(
    a: list[np.ndarray], metadata: np.ndarray, selector: int, kind: str
) -> np.ndarray:
    """A (16, 32) of a sparse m16n8k32: of every four columns the two that the metadata names."""
    packed = dense_operand(a, kind)
    out = np.zeros((16, 32), np.float64)
    for g in range(8):
        for half in range(2):
            word = int(metadata[4 * g + 2 * selector + half])
            for r in range(2):
                for k in range(4):
                    group = 4 * half + k
                    nibble = word >> (16 * r + 4 * k) & 15
                    first, second = nibble & 3, nibble >> 2
                    assert first < second, "ordered metadata"
                    row = g + 8 * r
                    out[row, 4 * group + first] = packed[row, 2 * group]
                    out[row, 4 * group + second] = packed[row, 2 * group + 1]
    return out


def right_operand(b: list[np.ndarray], kind: str) -> np.ndarray:
    """B (16 or 32, 8)."""
    out = np.zeros((8 * len(b), 8), np.float64)
    for i, word in enumerate(b):
        out[8 * i + 2 * T, G], out[8 * i + 2 * T + 1, G] = halves(word, kind)
    return out
