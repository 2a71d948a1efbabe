"""`replace_bigbird_attention`: what stays as it was, masks made once, memory, errors."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparse_layouts as sl
from tests.sparse_layouts.integrations.bigbird_models import (
    config,
    integration,
    modeling,
    padding,
    pair,
    run,
    small_config,
    transformers,
)

ROOT = Path(__file__).resolve().parents[3]
replace_bigbird_attention = integration.replace_bigbird_attention


# --- what does not change -------------------------------------------------------------------------


def test_parameters_and_their_names_stay() -> None:
    model = transformers.BigBirdForMaskedLM(small_config())
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    state = list(model.state_dict())
    assert replace_bigbird_attention(model) == 2
    assert list(model.state_dict()) == state
    assert dict(model.named_modules()) == modules
    assert all(p is before[name] for name, p in model.named_parameters())
    assert model.load_state_dict(model.state_dict())


def test_replacing_twice_changes_nothing() -> None:
    _, replaced = pair(False, small_config())
    assert replace_bigbird_attention(replaced) == 0


def test_a_layer_alone() -> None:
    model = transformers.BigBirdModel(small_config())
    assert replace_bigbird_attention(model.encoder.layer[1]) == 1
    assert replace_bigbird_attention(model) == 1
    first, second = (layer.attention.self for layer in model.encoder.layer)
    assert first.masks is second.masks


def test_short_inputs_switch_to_full_attention_and_back(assert_close: Callable[..., None]) -> None:
    original, replaced = (m.double() for m in pair(True, small_config()))
    for n, kind in ((36, "original_full"), (64, "original_full"), (64, "block_sparse")):
        if n == 64 and kind == "block_sparse":
            original.set_attention_type(kind)
            replaced.set_attention_type(kind)
        embeddings = torch.randn(2, n, 32, dtype=torch.float64)
        wanted = run(original, embeddings, padding(n, "right"))
        with sl.trace() as calls:
            found = run(replaced, embeddings, padding(n, "right"))
        assert bool(calls) == (kind == "block_sparse")
        assert replaced.attention_type == kind
        assert_close(found["out"], wanted["out"])
    assert all(type(a.self) is integration.LayoutBlockSparseAttention for a in attentions(replaced))
    with torch.no_grad():  # evaluation began while attention was full
        replaced.set_attention_type("original_full")
        replaced.eval().set_attention_type("block_sparse")
        original.eval()
        wanted, found = (
            m(inputs_embeds=embeddings).last_hidden_state for m in (original, replaced)
        )
    assert_close(found, wanted)


def attentions(model: Any) -> list[Any]:
    return [layer.attention for layer in model.encoder.layer]


@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_output_attentions_runs_the_original(by: str, assert_close: Callable[..., None]) -> None:
    original, replaced = (m.double() for m in pair(False, small_config()))
    embeddings, mask = torch.randn(2, 64, 32, dtype=torch.float64), padding(64, "right")
    more = {"output_attentions": True} if by == "argument" else {}
    if by == "configuration":
        original.config.output_attentions = replaced.config.output_attentions = True
    with torch.no_grad():
        wanted, found = (
            m(inputs_embeds=embeddings, attention_mask=mask, **more) for m in (original, replaced)
        )
    assert len(found.attentions) == len(wanted.attentions) == 2
    for f, w in zip(found.attentions, wanted.attentions, strict=True):
        assert f.shape == (2, 2, 64, 64)
        assert torch.equal(f, w)
    assert_close(found.last_hidden_state, wanted.last_hidden_state)


def test_other_modules_and_hooks_stay() -> None:
    model = transformers.BigBirdModel(small_config()).eval()
    seen: list[str] = []
    model.encoder.layer[0].attention.self.register_forward_hook(lambda *_: seen.append("self"))
    model.encoder.layer[0].attention.register_forward_hook(lambda *_: seen.append("attention"))
    replace_bigbird_attention(model)
    model(inputs_embeds=torch.randn(1, 64, 32))
    assert seen == ["self", "attention"]


def test_numpys_generator_is_left_alone() -> None:
    _, replaced = pair(True, small_config())
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must stay untouched
    replaced(inputs_embeds=torch.randn(1, 64, 32))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_copies_and_saved_models(assert_close: Callable[..., None]) -> None:
    _, replaced = pair(False, small_config())
    x = torch.randn(1, 64, 32)
    wanted = replaced(inputs_embeds=x).last_hidden_state
    file = io.BytesIO()
    torch.save(replaced, file)
    file.seek(0)
    for other in (copy.deepcopy(replaced), torch.load(file, weights_only=False)):
        masks = other.encoder.layer[0].attention.self.masks
        assert not masks.by_length
        assert masks is other.encoder.layer[1].attention.masks
        assert_close(other(inputs_embeds=x).last_hidden_state, wanted)
        assert masks.by_length


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compiled(train: bool, assert_close: Callable[..., None]) -> None:
    """Traced as a whole, forward and backward, once the masks are made; before, with a break."""
    _, replaced = pair(train, small_config())
    embeddings, mask = torch.randn(2, 64, 32), padding(64, "right")
    cold = copy.deepcopy(replaced)
    compiled = torch.compile(cold, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the model once at this length"):
        compiled(inputs_embeds=embeddings, attention_mask=mask)
    wanted = run(replaced, embeddings, mask)
    replaced.compile(backend="aot_eager", fullgraph=True)
    found = run(replaced, embeddings, mask)
    scale = max(float(g.norm()) for g in wanted.values())
    for name, w in wanted.items():
        assert_close(found[name], w, scale=None if name == "out" else scale)
    with torch.no_grad():
        compiled = torch.compile(cold, backend="aot_eager")
        out = compiled(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    assert_close(out, wanted["out"])


# --- masks and memory -----------------------------------------------------------------------------


def test_masks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, str, int]] = []

    def counted(seq_len: int, **how: Any) -> Any:
        made.append((seq_len, how["source"], how["seed"]))
        return sl.bigbird(seq_len, **how)

    monkeypatch.setattr(integration, "bigbird", counted)
    _, replaced = pair(False, small_config())
    monkeypatch.setattr(integration, "LENGTHS_KEPT", 3)
    lengths = [40, 44, 48]
    for _ in range(2):
        for n in lengths:
            replaced(inputs_embeds=torch.randn(1, n, 32))
    assert made == [(n, "hf-eval", 0) for n in lengths]  # one for all layers
    made.clear()
    for _ in range(2):
        replaced.train()(inputs_embeds=torch.randn(1, 40, 32))
    assert made == [(40, "hf-train", 0), (40, "hf-train", 1)]
    made.clear()
    kept = replaced.encoder.layer[0].attention.self.masks.by_length
    for n in (44, 52):
        replaced.eval()(inputs_embeds=torch.randn(1, n, 32))
    assert [n for n, _ in kept] == [40, 44, 52]  # 48 was used longest ago


def test_padding_is_read_once_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _, replaced = pair(False, small_config())
    masks = replaced.encoder.layer[0].attention.self.masks
    asked: list[bool] = []
    whole = integration._with_penalty
    monkeypatch.setattr(integration, "_with_penalty", lambda *a: asked.append(True) or whole(*a))
    x, mask = torch.randn(2, 64, 32), torch.ones(2, 64, dtype=torch.long)
    replaced(inputs_embeds=x, attention_mask=mask)
    assert not asked
    mask[1, 60:] = 0  # the same tensor, written to
    replaced(inputs_embeds=x, attention_mask=mask)
    assert len(asked) == 2
    blocked = mask.view(2, 16, 4)
    assert masks.pads(blocked)
    monkeypatch.setattr(Tensor, "all", lambda *_: pytest.fail("read again"))
    assert masks.pads(blocked)
    monkeypatch.undo()
    blocked[1] = 1
    assert not masks.pads(blocked)
    with torch.inference_mode():
        inside = torch.ones(2, 16, 4)
        assert not masks.pads(inside)
        inside[0, 0, 0] = 0
        assert masks.pads(inside)


def largest_allocation(call: Callable[[], Any]) -> int:
    """Bytes of the largest piece of memory that torch asked for, inside kernels too."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    results = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in results if event.name() == "[memory]")


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_no_dense_probabilities(train: bool) -> None:
    original, replaced = pair(train, config(num_hidden_layers=1))
    x, mask = torch.randn(1, 4096, 32), padding(4096, "right", 1)
    assert mask is not None
    mask[:, 4000:] = 0

    def step(model: Any) -> int:
        return largest_allocation(
            lambda: model(inputs_embeds=x, attention_mask=mask).last_hidden_state.sum().backward()
        )

    dense = 2 * 4096**2 * 4
    assert step(original) >= dense  # so that this test can fail
    assert step(replaced) <= dense / 16


# --- errors ---------------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(TypeError, match="expected a model, got dict"):
        replace_bigbird_attention({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no BigBird attention"):
        replace_bigbird_attention(nn.Linear(2, 2))
    full = transformers.BigBirdModel(small_config(attention_type="original_full"))
    with pytest.raises(ValueError, match=r"all 2 BigBird attentions of BigBirdModel are full"):
        replace_bigbird_attention(full)
    with pytest.raises(ValueError, match="has no seed to draw its blocks with"):
        replace_bigbird_attention(modeling.BigBirdAttention(small_config()))
    assert replace_bigbird_attention(modeling.BigBirdAttention(small_config(), seed=3)) == 1
    full.set_attention_type("block_sparse")  # the way out that the error names
    assert replace_bigbird_attention(full) == 2


def test_bad_calls() -> None:
    _, replaced = pair(False, small_config())
    attention = replaced.encoder.layer[0].attention.self
    with pytest.raises(ValueError, match="block_size 4 does not divide seq_len 62"):
        attention(torch.randn(1, 62, 32))
    _, replaced = pair(True, small_config())
    with pytest.raises(ValueError, match="random blocks and has"):
        replaced.encoder.layer[0].attention.self(torch.randn(1, 20, 32))


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_library_imports_no_transformers() -> None:
    code = (
        "import sys, sparse_layouts as sl\n"
        "assert 'transformers' not in sys.modules and not hasattr(sl, 'integrations')\n"
        "import sparse_layouts.integrations.transformers\n"
        "assert 'transformers' in sys.modules\n"
        "print(sl.integrations.transformers.replace_bigbird_attention.__name__)"
    )
    assert run_python(code) == "replace_bigbird_attention"


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "try:\n"
        "    import sparse_layouts.integrations.transformers\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert "pip install 'sparse_layouts[hf]'" in run_python(code)
