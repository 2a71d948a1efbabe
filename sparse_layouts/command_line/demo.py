"""`python -m sparse_layouts demo`: block-sparse matmul and attention on real text, and dense."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts import info
from sparse_layouts.measuring import (
    Timing,
    dense_attention,
    interleaved,
    peak_bytes,
    relative_error,
)
from sparse_layouts.viewing.pattern_picture import svg

Tell = Callable[[str], None]
"""Says what is being done now."""

BLOCK_OF_WORDS, KEPT_BLOCKS, EMBEDDING = 16, 0.15, 256
# What the times may take, in seconds, of the minute that the demo has.
MATMUL_BUDGET_S, ATTENTION_BUDGET_S = 4.0, 8.0


@dataclasses.dataclass
class Comparison:
    """One computation, timed sparse and dense in turns."""

    what: str
    sparse: Timing
    dense: Timing

    @property
    def ratio(self) -> float:
        """How many times faster sparse is; below 1 it is slower."""
        return self.dense.median_s / self.sparse.median_s


@dataclasses.dataclass
class Accuracy:
    """Relative errors (Frobenius norm) against float64, sparse and dense in the same dtype."""

    what: str
    sparse: float
    dense: float


@dataclasses.dataclass
class Part:
    """One half of the demo: what was computed, on what, and what came of it."""

    name: str
    title: str
    about: str
    layout: str
    dtype: str
    density: float
    density_of_causal: float | None
    facts: dict[str, float]
    errors: list[Accuracy]
    times: list[Comparison]
    memory_bytes: dict[str, int]
    explanation: sl.dispatch.Explanation
    picture: str


@dataclasses.dataclass
class Result:
    """What `run` returns."""

    device: str
    device_name: str
    versions: dict[str, str]
    threads: int
    load_average: float | None
    seconds: float
    parts: list[Part]

    def as_json(self) -> dict[str, Any]:
        """The numbers alone: no picture, and of the explanation its text."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "parts"}
        for part in self.parts:
            own = {
                f.name: getattr(part, f.name)
                for f in dataclasses.fields(part)
                if f.name not in ("name", "explanation", "picture")
            }
            own["errors"] = [dataclasses.asdict(e) for e in part.errors]
            own["times"] = [
                {
                    "what": t.what,
                    "sparse": t.sparse._asdict(),
                    "dense": t.dense._asdict(),
                    "dense_over_sparse": t.ratio,
                }
                for t in part.times
            ]
            own["kernel"] = part.explanation.kernel
            own["explain"] = repr(part.explanation)
            out[part.name] = own
        return out


def read_text() -> str:
    """The language reference that `help()` shows, 460 KB of English that every Python carries."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def co_occurrence(text: str, most_words: int | None = None) -> tuple[Tensor, list[str]]:
    """How often two words are neighbours (N, N), fp32, symmetric; the words, by frequency.

    N is the number of different words, or `most_words` of them, padded with empty rows to a
    multiple of the block.
    """
    spoken = re.findall(r"[a-z_]+", text.lower())
    words = [word for word, _ in Counter(spoken).most_common(most_words)]
    index = {word: i for i, word in enumerate(words)}
    at = torch.tensor([index.get(word, -1) for word in spoken])
    first, second = at[:-1], at[1:]
    known = (first >= 0) & (second >= 0)
    n = -(-len(words) // BLOCK_OF_WORDS) * BLOCK_OF_WORDS
    counts = torch.zeros(n, n)
    counts.index_put_((first[known], second[known]), torch.ones(()), accumulate=True)
    return counts + counts.T, words


def text_attention_inputs(text: str, length: int, heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v and an output gradient (1, H, N, D): random embeddings of bytes and positions."""
    data = torch.tensor(list(text.encode("utf-8")[:length]))
    draw = torch.Generator().manual_seed(0)
    of_byte = torch.randn(256, 3 * heads * head_dim, generator=draw)
    of_position = 0.5 * torch.randn(length, 3 * heads * head_dim, generator=draw)
    embedded = of_byte[data] + of_position
    q, k, v = embedded.view(length, 3, heads, head_dim).permute(1, 2, 0, 3)[:, None].contiguous()
    return [q, k, v, torch.randn(q.shape, generator=draw)]


def run(device: str, tell: Tell = lambda stage: None, *, quick: bool = False) -> Result:
    """Both parts on `device`, in fp32 on the CPU and bf16 on a GPU; `quick` takes small cases.

    >>> from sparse_layouts.command_line import demo
    >>> [part.name for part in demo.run("cpu", quick=True).parts]
    ['matmul', 'attention']
    """
    begin, load = time.perf_counter(), info.load_average()
    tell("reading the text")
    text = read_text()
    parts = [matmul_part(text, device, tell, quick), attention_part(text, device, tell, quick)]
    own = info.devices()
    name = own[0]["name"] if device == "cpu" else torch.cuda.get_device_name()
    seconds = time.perf_counter() - begin
    return Result(device, name, info.versions(), torch.get_num_threads(), load, seconds, parts)


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def matmul_part(text: str, device: str, tell: Tell, quick: bool) -> Part:
    """The co-occurrence matrix of the text's words, heaviest blocks kept, times embeddings."""
    tell("counting which words are neighbours")
    counts, words = co_occurrence(text, 512 if quick else None)
    dtype = _dtype(device)
    full = counts.to(device, dtype)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(full.shape[1], EMBEDDING, generator=draw).to(device, dtype)

    tell("keeping the heaviest blocks")
    w = sl.bsr(full, BLOCK_OF_WORDS, keep=sl.Magnitude(density=KEPT_BLOCKS))
    kept = w.to_dense()
    mass = float(kept.double().sum() / full.double().sum())

    tell("comparing the product with float64")
    exact = kept.double() @ x.double()
    lost = relative_error(kept @ x, full @ x)
    error = Accuracy(
        "w @ x",
        relative_error(torch.matmul(w, x), exact),
        relative_error(torch.matmul(kept, x), exact),
    )

    tell("timing sparse and dense matmul in turns")
    times = interleaved(
        {"sparse": lambda: torch.matmul(w, x), "dense": lambda: torch.matmul(full, x)},
        repeats=3 if quick else 31,
        budget_s=MATMUL_BUDGET_S,
        at_least=2,
        device=device,
    )
    memory = {
        "the matrix, sparse (values and indices)": w.nbytes,
        "the matrix, dense": full.nbytes,
        "made from the pattern and kept with it": w.cached_bytes,
    }
    if device != "cpu":
        memory["allocated while multiplying, sparse"] = peak_bytes(
            lambda: torch.matmul(w, x), device
        )
        memory["allocated while multiplying, dense"] = peak_bytes(
            lambda: torch.matmul(full, x), device
        )
    return Part(
        name="matmul",
        title="Word co-occurrence times embeddings",
        about=f"{len(words)} words of Python's own documentation, the most frequent first; how "
        f"often two of them are neighbours; of its {BLOCK_OF_WORDS} x {BLOCK_OF_WORDS} blocks the "
        f"heaviest {KEPT_BLOCKS:.0%}, times embeddings of {EMBEDDING}.",
        layout=repr(w),
        dtype=str(dtype).removeprefix("torch."),
        density=w.density,
        density_of_causal=None,
        facts={
            "share of the matrix's entries that are not 0": float((full != 0).double().mean()),
            "share of the matrix's mass in the kept blocks": mass,
            "what dropping the other blocks changes in the product": lost,
        },
        errors=[error],
        times=[Comparison("w @ x", times["sparse"], times["dense"])],
        memory_bytes=memory,
        explanation=sl.explain(torch.matmul, w, x),
        picture=svg(w),
    )


def attention_part(text: str, device: str, tell: Tell, quick: bool) -> Part:
    """Causal local-stride attention over the text's first bytes, forward and backward."""
    length, heads, head_dim = (512, 2, 32) if quick else (8192, 4, 64)
    tell("building the attention mask")
    mask = sl.local_stride(
        length, block_size=64, local_blocks=4, vert_stride=8, num_heads=heads, device=device
    )
    dtype = _dtype(device)
    q, k, v, dout = (
        t.to(device, dtype) for t in text_attention_inputs(text, length, heads, head_dim)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def forward(**how: Any) -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v, **how)

    def both(**how: Any) -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(q, k, v, **how)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    tell("attending densely, also in float64, to compare with")
    two = [0, heads - 1]  # heads that are compared: they do not touch each other
    dense_mask = mask.to_dense()[two]

    def stored(start: int, stop: int) -> Tensor:
        return dense_mask[:, start:stop]

    few = [t[:, two] for t in (q, k, v, dout)]
    given = (few[0], few[1], few[2], stored, few[3])
    exact = dense_attention(*given, causal=True)
    dense = dense_attention(*given, causal=True, dtype=dtype)
    tell("attending sparsely, forward and backward")
    sparse = [t[:, two] for t in both(attn_mask=mask)]
    errors = [
        Accuracy(name, relative_error(s, e), relative_error(d, e))
        for name, s, d, e in zip(
            ("output", "gradient of q", "gradient of k", "gradient of v"),
            sparse,
            dense,
            exact,
            strict=True,
        )
    ]
    del exact, dense, sparse

    tell("timing sparse and dense attention in turns, forward")
    repeats = 3 if quick else 9
    fast = interleaved(
        {"sparse": lambda: forward(attn_mask=mask), "dense": lambda: forward(is_causal=True)},
        repeats=repeats,
        budget_s=ATTENTION_BUDGET_S / 3,
        at_least=2,
        device=device,
    )
    tell("timing sparse and dense attention in turns, forward and backward")
    slow = interleaved(
        {"sparse": lambda: both(attn_mask=mask), "dense": lambda: both(is_causal=True)},
        repeats=repeats,
        budget_s=ATTENTION_BUDGET_S * 2 / 3,
        at_least=2,
        device=device,
    )
    scores = heads * length * length
    memory = {
        "the mask, sparse": mask.nbytes,
        "the mask, dense, one byte an entry (not made)": scores,
        "the scores, dense, in fp32 (not made)": 4 * scores,
        "made from the pattern and kept with it": mask.cached_bytes,
    }
    if device != "cpu":
        memory["allocated forward and backward, sparse"] = peak_bytes(
            lambda: both(attn_mask=mask), device
        )
        memory["allocated forward and backward, dense causal"] = peak_bytes(
            lambda: both(is_causal=True), device
        )
    return Part(
        name="attention",
        title="Local-stride attention over bytes",
        about=f"The first {length} bytes of the same text, {heads} heads of {head_dim}, blocks of "
        "64: each sees the last 4 blocks and every 8th before, another 8th in each head. Dense is "
        "torch's own causal attention, which computes all of the triangle.",
        layout=repr(mask),
        dtype=str(dtype).removeprefix("torch."),
        density=mask.density,
        density_of_causal=mask.density_of_causal,
        facts={},
        errors=errors,
        times=[
            Comparison("forward", fast["sparse"], fast["dense"]),
            Comparison("forward and backward", slow["sparse"], slow["dense"]),
        ],
        memory_bytes=memory,
        explanation=sl.explain(F.scaled_dot_product_attention, q, k, v, attn_mask=mask),
        picture=svg(mask),
    )
