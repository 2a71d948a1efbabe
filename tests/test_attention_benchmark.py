"""The attention benchmark: its patterns are the masks', and no wrong result gets a number."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import sparse_layouts as sl
from benchmarks import attention, gpu_command, report
from benchmarks import attention_calls as calls
from benchmarks import attention_cases as cases
from benchmarks import attention_fp8 as fp8
from benchmarks import attention_rivals as rivals
from benchmarks.attention_cases import BEST, CASES, CUDNN, DKERNEL, FLASH2, FLEX, Case
from benchmarks.attention_preparation import Task, prepare_all, tasks
from benchmarks.attention_reference import check, places, results_of
from benchmarks.timing import Row, WrongResult
from sparse_layouts.kernels.block_attention import cpu, cpu_backward
from sparse_layouts.kernels.block_attention_fp8 import dequantized
from sparse_layouts.measuring import Timing, interleaved


def tiny(case: Case) -> Case:
    """A case's pattern on few tokens and heads, in a dtype that the CPU multiplies fast."""
    pattern: Any = case.pattern
    if isinstance(pattern, cases.LocalStride):
        dense_heads = min(1, pattern.dense_heads)
        pattern = cases.LocalStride(2, 4, dense_heads)
    elif isinstance(pattern, cases.Window):
        pattern = cases.Window(100)
    return dataclasses.replace(
        case,
        pattern=pattern,
        batch=1,
        heads=4,
        kv_heads=None if case.kv_heads is None else 2,
        seq_len=4 * case.block if case.block == 128 else 512,
        head_dim=16,
        dtype=torch.float32,
    )


EVERY = [*(pytest.param(tiny(case), id=case.name) for case in CASES)]
LOCAL = tiny(CASES[0])


def on_cpu(**more: Any) -> attention.Run:
    return attention.Run(tell=lambda stage: None, device="cpu", **more)


@pytest.fixture
def cpu_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times by the CPU's clock, where there is no device's."""

    def times(variants: Any, *, rounds: int, rep_ms: int) -> dict[str, Timing]:
        return interleaved(variants, repeats=2)

    monkeypatch.setattr(attention, "gpu_times", times)
    monkeypatch.setattr(rivals, "gpu_times", times)
    monkeypatch.setattr(fp8, "gpu_times", times)


# --- patterns and references ----------------------------------------------------------------------


@pytest.mark.parametrize("case", EVERY)
def test_a_pattern_is_the_mask(case: Case) -> None:
    mask = case.pattern.mask(case, "cpu")
    counts = cases.rows_of(case, range(case.heads), "cpu")(0, case.seq_len)
    dense = mask.to_dense().expand(case.heads, -1, -1)
    assert torch.equal(counts != 0, dense)
    assert case.pairs(mask) == int(dense.sum()) * case.batch
    whole = dense.shape[-1] * (dense.shape[-1] + 1) / 2 if case.pattern.causal else dense[0].numel()
    assert case.dense_pairs == whole * case.heads * case.batch
    assert case.density(mask) == pytest.approx(float(dense.sum()) / (whole * case.heads))
    if case.pattern.causal:
        assert not bool(dense.triu(1).any())
        assert case.density(mask) == pytest.approx(mask.density_of_causal)
    if not case.pattern.by_head:
        assert bool((counts == counts[:1]).all())


def test_some_pattern_counts_and_some_rows_differ() -> None:
    found = {case.name: tiny(case).pattern.mask(tiny(case), "cpu") for case in CASES}
    assert found["bigbird counts"].block_counts() is not None
    counted = tiny(next(case for case in CASES if case.name == "bigbird counts"))
    assert int(cases.rows_of(counted, [0], "cpu")(64, 128).max()) == 4
    assert found["random 10% block 16"].block_size == (16, 16)


@pytest.mark.parametrize("case", EVERY)
def test_results_are_compared_with_float64(case: Case) -> None:
    given = rivals.operands(case, "cpu")
    mine = rivals.ours(case, given, case.pattern.mask(case, "cpu"))
    checked = check(case, given, mine)
    assert checked.wrong == {"forward": "", "backward": ""}
    for error, dense_error in checked.errors.values():
        assert 0 < error < 1e-5
        assert 0 < dense_error < 1e-5
    assert checked.kernels == {"forward": "cpu", "backward": "cpu"}
    assert {n: t.shape for n, t in checked.results.items()} == {
        "out": given.q.shape,
        "dq": given.q.shape,
        "dk": given.k.shape,
        "dv": given.v.shape,
    }


def test_first_middle_and_last_heads_are_compared() -> None:
    assert places(dataclasses.replace(LOCAL, batch=3, heads=8)) == [(0, 0), (1, 4), (2, 7)]
    assert places(dataclasses.replace(LOCAL, heads=8, kv_heads=2)) == [(0, 0), (0, 1)]
    assert places(dataclasses.replace(LOCAL, heads=1)) == [(0, 0)]


def test_a_pair_costs_four_operations_a_feature_and_backward_two_and_a_half_times_that() -> None:
    assert LOCAL.flop(10, "forward") == 4 * 16 * 10
    assert LOCAL.flop(10, "backward") == 2.5 * 4 * 16 * 10


# --- wrong results --------------------------------------------------------------------------------


def scaled(function: Callable[..., Any], which: int, factor: float = 1.001) -> Callable[..., Any]:
    """One of a kernel's results a thousandth too large, in the last head alone."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        results = list(function(*args, **kwargs))
        results[which] = results[which].clone()
        results[which][:, -1] *= factor
        return tuple(results)

    return wrong


@pytest.fixture
def wrong_kernel() -> Iterator[Callable[..., None]]:
    """Registers a kernel before the others, for the test."""
    made: list[Any] = []

    def register(op: str, function: Callable[..., Any]) -> None:
        made.append(sl.kernel(op, name="wrong")(function))

    yield register
    for kernel in made:
        kernel.unregister()


def test_a_wrong_output_makes_both_directions_wrong(
    wrong_kernel: Callable[..., None], cpu_clock: None
) -> None:
    wrong_kernel("block_attention", scaled(cpu.block_attention, 0))
    rows = list(attention.measure(LOCAL, cases.DIRECTIONS, on_cpu(), {}))
    assert [row.name for row in rows] == ["A1 forward", "A1 backward"]
    assert "A1, out of KV head 3, sample 0: relative error 1.00e-03" in rows[0].wrong
    for row in rows:
        assert "relative error" in row.wrong
        assert row.timing is None
        assert row.measured is None
        assert row.kernel == ("wrong" if row.name == "A1 forward" else "cpu")
        assert attention.short_cells(row)[2:5] == ["", "", ""]
        assert report.cells(row)[-1] == "no"


def test_gradients_of_a_wrong_output_count_as_wrong() -> None:
    given = rivals.operands(LOCAL, "cpu")
    mine = rivals.ours(LOCAL, given, LOCAL.pattern.mask(LOCAL, "cpu"))
    shifted = mine._replace(attend=lambda *leaves: mine.attend(*leaves) + 1e-3)
    checked = check(LOCAL, given, shifted)
    assert "A1, out of KV head 0" in checked.wrong["forward"]
    assert checked.wrong["backward"] == checked.wrong["forward"]
    with pytest.raises(WrongResult, match="relative error"):
        checked.sound()


def test_a_wrong_gradient_costs_backward_alone(
    wrong_kernel: Callable[..., None], cpu_clock: None
) -> None:
    wrong_kernel("block_attention_backward", scaled(cpu_backward.block_attention_backward, 1))
    forward, backward = attention.measure(LOCAL, cases.DIRECTIONS, on_cpu(), {})
    assert "dk of KV head 3" in backward.wrong
    assert backward.timing is None
    assert not forward.wrong
    assert forward.timing is not None


def test_gradients_that_change_between_runs_are_wrong(
    wrong_kernel: Callable[..., None], cpu_clock: None
) -> None:
    runs = iter(range(100))

    def unsteady(*args: Any, **kwargs: Any) -> Any:
        dq, *rest = cpu_backward.block_attention_backward(*args, **kwargs)
        dq = dq.clone()
        dq.view(-1)[0] += next(runs) * 1e-7
        return dq, *rest

    wrong_kernel("block_attention_backward", unsteady)
    forward, backward = attention.measure(LOCAL, cases.DIRECTIONS, on_cpu(), {})
    assert backward.wrong == "A1: dq differs in its bits between two runs"
    assert backward.timing is None
    assert forward.timing is not None


def test_a_wrong_call_gets_no_time(wrong_kernel: Callable[..., None]) -> None:
    wrong_kernel("block_attention", scaled(cpu.block_attention, 0, 1.1))
    rows = list(calls.run(["call tiny", "compilations"], True, lambda stage: None, device="cpu"))
    assert [row.name for row in rows] == [*calls.NAMES[:2], calls.COMPILATIONS]
    for row in rows:
        assert "relative error" in row.wrong
        assert row.timing is None
        assert row.measured is None


# --- rivals ---------------------------------------------------------------------------------------


def test_a_case_against_rivals_that_are_not_there(cpu_clock: None) -> None:
    row, _ = attention.measure(LOCAL, cases.DIRECTIONS, on_cpu(without=[FLEX]), {})
    # cuDNN has no kernel for the CPU: torch's other dense attention stands in for it
    assert list(row.rivals) == [FLASH2]
    assert row.share is None
    notes = " | ".join(row.notes)
    for part in (
        f"{CUDNN}: RuntimeError",
        f"{FLEX}: left out, as asked",
        "dkernel: NotInstalled",
        "kernel cpu",
    ):
        assert part in notes
    assert row.bar == 1.35
    assert row.flops == pytest.approx(row.flop / row.timing.median_s)  # type: ignore[operator, union-attr]


def test_a_rival_that_broke_its_process_or_comes_too_late_is_a_note(cpu_clock: None) -> None:
    row = Row("A1 forward", "cpu")
    given = rivals.operands(LOCAL, "cpu")
    broken = {Task("A1", FLEX): "exit 1: CUDA error"}
    late = on_cpu(deadline=0.0)
    found, missing = attention.found_rivals(LOCAL, given, row, "forward", late, broken, {})
    assert found == {}
    assert missing == list(LOCAL.rivals)
    assert f"{FLEX}: left out, its process ended by exit 1: CUDA error" in row.notes
    assert f"{DKERNEL}: left out, no time left" in row.notes


def test_a_rival_with_another_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given = rivals.operands(LOCAL, "cpu")
    mask = LOCAL.pattern.mask(LOCAL, "cpu")
    expected = results_of(rivals.ours(LOCAL, given, mask))
    swapped = tuple(t.detach().transpose(1, 2).clone().requires_grad_() for t in given.leaves)
    right = rivals.Variant(
        lambda q, k, v: sl.attention(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2),
        swapped,
        given.dout.transpose(1, 2),
        tokens_first=True,
    )
    for other in (right, right._replace(dout=2 * right.dout)):
        monkeypatch.setitem(rivals.RIVALS, "other", lambda *given, other=other: other)
        attention.right("other", LOCAL, given, "forward", expected)
        if other is right:
            attention.right("other", LOCAL, given, "backward", expected)
    with pytest.raises(attention.Differs, match=r"its dq differs by 1\.0e\+00"):
        attention.right("other", LOCAL, given, "backward", expected)


def test_the_fastest_candidate_is_taken(cpu_clock: None) -> None:
    given = rivals.operands(LOCAL, "cpu")
    tried: list[str] = []

    def candidate(name: str, seconds: float) -> Callable[[], rivals.Variant]:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if seconds < 0:
                raise RuntimeError("does not compile")
            time.sleep(seconds)
            return q + k + v

        def make() -> rivals.Variant:
            tried.append(name)
            return rivals.Variant(attend, given.leaves, given.dout, note=name)

        return make

    slow, bad, fast = candidate("slow", 0.02), candidate("bad", -1), candidate("fast", 0.001)
    later = time.monotonic() + 60
    variant = rivals.fastest([slow, bad, fast], "forward", later)
    assert variant.note == "fast, the fastest of 2; 1 failed: RuntimeError: does not compile"
    tried.clear()
    assert rivals.fastest([bad, slow, fast], "forward", 0.0).note.startswith("slow, the fastest of")
    assert tried == ["bad", "slow"]  # one has to run, whatever the time
    with pytest.raises(RuntimeError, match="no candidate runs: RuntimeError: does not compile"):
        rivals.fastest([bad, bad], "forward", later)


@pytest.mark.parametrize("edges", [64, (128, 64), 128])
@pytest.mark.parametrize("case", EVERY)
def test_flex_attention_is_given_the_pattern(case: Case, edges: Any) -> None:
    from torch.nn.attention.flex_attention import create_mask

    mask = rivals.block_mask(case, edges, "cpu")
    n, heads = case.seq_len, case.heads if case.pattern.by_head else 1
    own = create_mask(mask.mask_mod, None, case.heads, n, n, device="cpu")[0]
    assert torch.equal(own, case.pattern.mask(case, "cpu").to_dense().expand(case.heads, -1, -1))
    rows, columns = (edges, edges) if isinstance(edges, int) else edges
    tiled = own[:heads].view(heads, n // rows, rows, n // columns, columns).transpose(2, 3)
    some, full = tiled.any(-1).any(-1), tiled.all(-1).all(-1)
    partial = mask.kv_num_blocks[0], mask.kv_indices[0], some & ~full
    whole = mask.full_kv_num_blocks[0], mask.full_kv_indices[0], full
    for counts, indices, expected in (partial, whole):
        assert torch.equal(counts, expected.sum(-1).int())
        listed = torch.zeros_like(expected)
        for place in expected.sum(-1).nonzero().tolist():
            first = indices[tuple(place)][: counts[tuple(place)]]
            assert first.tolist() == sorted(first.tolist())
            listed[tuple(place)][first.long()] = True
        assert torch.equal(listed, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["A1", "GQA", "bigbird counts", "window 4096"])
def test_flex_attention_computes_the_pattern(
    name: str, monkeypatch: pytest.MonkeyPatch, cpu_clock: None
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = tiny(next(case for case in CASES if case.name == name))
    given = rivals.operands(case, "cpu")
    mask = case.pattern.mask(case, "cpu")
    exact = rivals.ours(case, given, sl.without_counts(mask)).attend(*given.leaves)
    # FlexAttention has no gradients on the CPU
    detached = rivals.Operands(*(t.detach() for t in given))
    variant = rivals.flex_attention(case, detached, "forward", 60.0)
    ((_, out),) = variant.results("forward")
    torch.testing.assert_close(out, exact.detach())
    assert f"the fastest of {len(case.flex)}" in variant.note


class FlashAttention4(NamedTuple):
    """Stands in for the tuple of that name: the fields that are used, by the real one's names."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]

    def stored(self, mask_mod: Any, n: int) -> torch.Tensor:
        """bool (H, N, N)."""
        heads, block = self.mask_block_cnt.shape[1], self.block_size[0]
        i = torch.arange(block)
        out = torch.zeros(heads, n, n, dtype=torch.bool)
        for h in range(heads):
            for row in range(n // block):
                for counts, indices, full in (
                    (self.mask_block_cnt, self.mask_block_idx, False),
                    (self.full_block_cnt, self.full_block_idx, True),
                ):
                    for column in indices[0, h, row, : counts[0, h, row]].tolist():
                        at_row, at_column = row * block + i[:, None], column * block + i
                        tile = full or mask_mod(0, h, at_row, at_column, None, None)
                        out[h, at_row, at_column] = tile
        return out


def stand_ins(flash_attn_func: Any) -> dict[str, types.ModuleType]:
    """Modules by the names that FlashAttention-4 is imported by."""
    found = {}
    for name in (
        *("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"),
        *("flash_attn.cute.block_sparsity", "cutlass", "cutlass.cute"),
    ):
        found[name] = types.ModuleType(name)
        found[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        found[name].__path__ = []  # type: ignore[attr-defined]
    found["cutlass"].cute = found["cutlass.cute"]  # type: ignore[attr-defined]
    found["cutlass.cute"].jit = lambda function: function  # type: ignore[attr-defined]
    sparsity = found["flash_attn.cute.block_sparsity"]
    sparsity.BlockSparseTensorsTorch = FlashAttention4  # type: ignore[attr-defined]
    interface = found["flash_attn.cute.interface"]
    interface.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("name", ["A1", "A2", "GQA", "bigbird training", "random 20% block 64"])
def test_flash_attention_4_computes_the_pattern(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(next(case for case in CASES if case.name == name))
    n = case.seq_len

    def flash_attn_func(
        *tensors: torch.Tensor,
        mask_mod: Any,
        block_sparse_tensors: FlashAttention4,
        block_sparse_tensors_bwd: FlashAttention4,
    ) -> tuple[torch.Tensor, None]:
        stored = block_sparse_tensors.stored(mask_mod, n)
        turned = None if mask_mod is None else lambda b, h, k, q, *rest: mask_mod(b, h, q, k, *rest)
        assert torch.equal(block_sparse_tensors_bwd.stored(turned, n), stored.mT)
        heads_first = (t.transpose(1, 2) for t in tensors)
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, attn_mask=stored, enable_gqa=True
        )
        return out.transpose(1, 2), None

    for module, stand_in in stand_ins(flash_attn_func).items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    given = rivals.operands(case, "cpu")
    expected = results_of(rivals.ours(case, given, case.pattern.mask(case, "cpu")))
    for direction in cases.DIRECTIONS:
        variant = rivals.flash_attention_4(case, given, direction, 0.0)
        assert variant.leaves[0].shape == (case.batch, n, case.heads, case.head_dim)
        for result, tensor in variant.results(direction):
            torch.testing.assert_close(tensor, expected[result])


def test_flash_attention_4_gets_blocks_that_the_diagonal_alone_cuts() -> None:
    some, full = rivals.diagonal_tiles(LOCAL, "cpu")
    blocks = LOCAL.seq_len // LOCAL.block
    assert torch.equal(some & ~full, torch.eye(blocks, dtype=torch.bool).expand_as(some))
    window = dataclasses.replace(LOCAL, pattern=cases.Window(100))
    with pytest.raises(ValueError, match="cut by more than the diagonal"):
        rivals.diagonal_tiles(window, "cpu")
    with pytest.raises(ValueError, match="tiles of 96 x 64 do not divide 512 tokens"):
        cases.tiles_of(LOCAL, 96, 64, "cpu")


def test_what_is_not_installed_says_so() -> None:
    given = rivals.operands(LOCAL, "cpu")
    for make in (rivals.dkernel, rivals.flash_attention_4):
        with pytest.raises(rivals.NotInstalled, match="is not importable"):
            make(LOCAL, given, "forward", 0.0)
    assert rivals.installed("json.decoder")
    assert not rivals.installed("no_such_package.part")


# --- preparation ----------------------------------------------------------------------------------


def test_whoever_compiles_is_prepared_the_longest_first() -> None:
    chosen = [case for case in CASES if case.name in ("A1", "causal")]
    assert tasks(chosen, []) == [
        Task("A1", "dkernel"),
        Task("A1", "FlexAttention"),
        Task("causal", "FlexAttention"),
        Task("A1", "FlashAttention-4"),
        Task("causal", "FlashAttention-4"),
        Task("A1", "sparse_layouts"),
        Task("causal", "sparse_layouts"),
    ]
    assert {task.who for task in tasks(chosen, [FLEX, DKERNEL])} == {
        "FlashAttention-4",
        "sparse_layouts",
    }


def test_processes_prepare_at_once_and_those_that_die_are_known() -> None:
    programs = {
        "fine": "pass",
        "dies": "raise SystemExit('no such device')",
        "sleeps": "import time; time.sleep(60)",
    }
    told: list[str] = []
    begin = time.monotonic()
    died = prepare_all(
        [Task("sleeps", ""), Task("dies", ""), Task("fine", "")],
        2,
        begin + 4,
        told.append,
        lambda task: [sys.executable, "-c", programs[task.case]],
    )
    assert died == {Task("dies", ""): "exit 1: no such device"}
    assert told == ["1 of 3 preparations had no time left"]
    assert time.monotonic() - begin < 40


# --- rows and bars --------------------------------------------------------------------------------


def timing(seconds: float) -> Timing:
    return Timing(seconds, 0.9 * seconds, 1.1 * seconds, 3)


def row_over(**rivals_seconds: float) -> Row:
    row = Row("A1 forward", "cuda", timing=timing(1.0), flop=3e14)
    row.rivals = {name: timing(seconds) for name, seconds in rivals_seconds.items()}
    return row


def test_a_bar_is_over_the_rival_that_it_names() -> None:
    row = row_over(dkernel=1.8, cuDNN=3.0)
    attention.hold_to_bar(row, (1.7, DKERNEL), [])
    assert row.holds
    assert report.bar_of(row) == ">= 1.7x dkernel"
    row = row_over(cuDNN=3.0)
    attention.hold_to_bar(row, (1.7, DKERNEL), [DKERNEL])
    assert row.holds is None  # nobody to compare with
    attention.hold_to_bar(row, None, [])
    assert row.bar == 1.7


def test_a_bar_over_the_best_rival_needs_them_all() -> None:
    row = row_over(dkernel=1.8, cuDNN=3.0)
    attention.hold_to_bar(row, (1.5, BEST), [])
    assert (row.measured, row.holds) == (1.8, True)
    row = row_over(dkernel=1.8, cuDNN=3.0)
    attention.hold_to_bar(row, (1.5, BEST), ["FlashAttention-4"])
    assert row.holds is None
    assert row.notes == ["the bar is over the best rival, and FlashAttention-4 is missing"]
    row = row_over(dkernel=1.2)
    attention.hold_to_bar(row, (1.5, BEST), ["FlashAttention-4"])
    assert row.holds is False  # whoever is missing could only be faster


def test_a_row_says_its_rate_and_its_share_of_the_dense_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        attention,
        "gpu_times",
        lambda variants, **effort: dict(zip(variants, [timing(1e-3), timing(4e-3)], strict=True)),
    )
    case = next(case for case in CASES if case.name == "random 20% block 64")
    given = rivals.operands(tiny(case), "cpu")
    mine = rivals.ours(tiny(case), given, tiny(case).pattern.mask(tiny(case), "cpu"))
    row = Row("random", "cuda", flop=case.flop(0.2 * case.dense_pairs, "forward"), density=0.2)
    attention.time_row(case, row, mine, {CUDNN: mine}, "forward", on_cpu())
    assert row.ratios == {CUDNN: pytest.approx(4.0)}
    assert row.share == pytest.approx(0.8)  # a fifth of the work in a quarter of the time
    assert attention.short_cells(row) == [
        "random",
        "20.0%",
        "1 ms ±10%",
        f"{row.flop / 1e-3 / 1e12:.0f}",  # type: ignore[operator]
        "80%",
        "4.00x cuDNN",
        "",
        "",
    ]
    assert report.cells(row)[4] == "4.00x cuDNN dense 4 ms 80% of the FLOP/s of cuDNN dense"


def test_names_are_those_of_the_rows_and_can_be_chosen(cpu_clock: None) -> None:
    known = attention.names(False)
    assert len(set(known)) == len(known)
    assert known[: len(calls.NAMES) + 2] == [*calls.NAMES, "A1 forward", "A1 backward"]
    shown: list[str] = []
    chosen = ["GQA", "call tiny", "build"]
    how = on_cpu(quick=True, without=[FLEX], show=lambda row: shown.append(row.name))
    rows = attention.run(chosen, how)
    assert [row.name for row in rows] == shown
    assert shown == [*calls.NAMES[:2], calls.BUILD, "GQA forward", "GQA backward"]
    for row in rows:
        assert not row.wrong
        assert row.timing is not None
        assert row.bar is None  # small sizes are held to none
    assert attention.run(["nothing of the kind"], how) == []


def test_a_row_is_shown_before_the_next_fails(
    monkeypatch: pytest.MonkeyPatch, cpu_clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    time_row = attention.time_row

    def fails_backward(case: Case, row: Row, *rest: Any) -> None:
        if row.name.endswith("backward"):
            raise RuntimeError("no memory left")
        time_row(case, row, *rest)

    monkeypatch.setattr(attention, "time_row", fails_backward)
    shown: list[str] = []
    how = on_cpu(quick=True, without=[FLEX], show=lambda row: shown.append(row.name))
    rows = attention.run(["GQA", "window"], how)
    assert shown == ["window 100 forward", "window 100", "GQA forward", "GQA"]
    assert rows[1].wrong == "RuntimeError: no memory left"
    assert rows[0].timing is not None
    assert "Traceback" in capsys.readouterr().err


def test_past_the_deadline_rows_are_left_out() -> None:
    rows = attention.run(["A1", "call tiny"], on_cpu(deadline=0.0))
    assert [row.name for row in rows] == [*calls.NAMES[:2], "A1 forward", "A1 backward"]
    for row in rows:
        assert row.notes == ["left out: no time left"]
        assert attention.short_cells(row)[5] == "left out: no time left"


def test_rows_are_written_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cpu_clock: None
) -> None:
    rows = attention.run(["A0", "compilations"], on_cpu(quick=True, without=[FLEX]))
    where = report.environment()
    name = gpu_command.file_name("NVIDIA H200", attention.SUBJECT)
    report.write(tmp_path, name, rows, where, quick=True)
    found = json.loads((tmp_path / "h200_attention.json").read_text(encoding="utf-8"))
    assert {"date", "commit", "versions", "devices", "quick", "rows"} <= set(found)
    assert found["rows"][0]["measured"] == 0  # the CPU compiles nothing
    forward = found["rows"][1]
    assert forward["name"] == "A0 forward"
    assert forward["timing"]["median_s"] > 0
    assert forward["kernel"] == "cpu"
    assert set(forward["ratios"]) == set(forward["rivals"]) == {FLASH2}
    assert forward["share"] is None
    assert forward["graph"] is None
    assert forward["error"] <= 2 * forward["dense_error"] + 1e-1
    assert "A0 backward" in (tmp_path / "h200_attention.txt").read_text(encoding="utf-8")
    capsys.readouterr()
    for row in rows:
        attention.show(row)
    attention.print_short(rows)
    out = capsys.readouterr().out
    assert out.count("A0 forward") == 2
    assert "TFLOP/s" in out
    assert "kernel cpu" in out


def test_a_table_without_rich_is_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    attention.print_short([row_over(dkernel=1.8)])
    out = capsys.readouterr().out
    assert "A1 forward" in out
    assert "1.80x dkernel" in out
    assert "─" not in out


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == attention.names(False)
    with pytest.raises(SystemExit) as stopped:
        attention.main(["--only", "no such row"])
    assert stopped.value.code == 2
    assert "no row contains 'no such row'; --list names them" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert attention.main(["--only", "A1"]) == 1
        assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_file_runs_as_a_script(tmp_path: Path) -> None:
    script = Path(attention.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--list"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == attention.names(False)


# --- 8 bits ---------------------------------------------------------------------------------------


def test_what_8_bits_lose_is_said(cpu_clock: None) -> None:
    rows = attention.run(["FP8"], on_cpu(quick=True))
    assert [row.name for row in rows] == fp8.names(True)
    for row in rows:
        assert not row.wrong
        assert row.timing is not None
        assert row.kernel == "dequantized"
        assert row.dense_error is None  # it is not held to that of 16 bits
        assert row.error is not None
        assert 0.005 < row.error < 0.1
        normal, with_means = (note for note in row.notes if "error against float64" in note)
        assert "without smooth_k" in normal
        assert "in 16 bits 0." in with_means
        assert fp8.IN_16_BITS in row.rivals
    assert report.accuracy(rows) == ""


def test_wrong_numbers_in_8_bits_get_no_time(
    wrong_kernel: Callable[..., None], cpu_clock: None
) -> None:
    wrong_kernel(fp8.OP, scaled(dequantized.block_attention_fp8, 0, 1.2))
    rows = list(fp8.run(["FP8 stride"], True, lambda stage: None, device="cpu"))
    assert [row.name for row in rows] == ["FP8 stride"]
    assert "against float64 on the same e4m3 operands" in rows[0].wrong
    assert rows[0].timing is None


def test_8_bits_past_the_deadline_are_left_out() -> None:
    rows = list(fp8.run(["FP8 D 64"], False, lambda stage: None, 0.0, "cpu"))
    assert [row.name for row in rows] == ["FP8 D 64", "FP8 D 64 and quantising"]
    assert all(row.notes == ["left out: no time left"] for row in rows)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.gpu
def test_one_tiny_row_on_a_gpu(tmp_path: Path) -> None:
    chosen = ["--quick", "--only", "A0", "--without", FLEX, "--graph", "--out", str(tmp_path)]
    assert attention.main(chosen) == 0
    (file,) = tmp_path.glob("*_attention.json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["A0 forward", "A0 backward"]
    for row in rows:
        assert row["timing"]["median_s"] > 0
        assert row["graph"]["median_s"] > 0, row["notes"]
        assert row["kernel"] not in ("", "cpu")
        assert row["ratios"]


@pytest.mark.gpu
def test_what_calls_cost_on_a_gpu() -> None:
    rows = list(calls.run([], True, lambda stage: None))
    assert [row.name for row in rows] == calls.NAMES
    assert not [row.wrong for row in rows if row.wrong]
    assert all(row.measured is not None for row in rows)


@pytest.mark.gpu
def test_8_bits_on_a_gpu() -> None:
    rows = list(fp8.run([], True, lambda stage: None, rounds=1, rep_ms=5))
    assert [row.name for row in rows] == fp8.names(True)
    for row in rows:
        assert not row.wrong
        assert row.timing is not None
        assert any(note.startswith("in CUDA graphs") for note in row.notes)
