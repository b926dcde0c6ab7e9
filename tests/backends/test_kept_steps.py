"""Compiled steps that later processes find again, and everything that must make them compile anew."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import CompressedModel
from fxcompress.backends import kept_steps
from fxcompress.backends.cpu import toolchain
from fxcompress.backends.dynamo import InductorBackend
from fxcompress.backends.kept_key import ModuleWatch
from fxcompress.backends.kept_steps import KEEP_VARIABLE
from fxcompress.decoding import DecodeSession
from tests.zoo import entry

NAME = "llama-tied-odd"
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


class TracedError(Exception):
    """A graph was traced and about to be compiled."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    folder = tmp_path_factory.mktemp("kept") / "small"
    torch.manual_seed(0)
    fxcompress.compress(entry(NAME).build(), "w4a8", verify="off").save(folder)
    return folder


def load(saved: Path) -> CompressedModel:
    """As a new process would: nothing that Dynamo has compiled is known."""
    torch._dynamo.reset()
    return fxcompress.load(saved, model=entry(NAME).build())


def ids(batch: int = 1, length: int = 7) -> Tensor:
    return entry(NAME).tensors(batch, length)["input_ids"]


def generated(small: CompressedModel, inputs: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(3)
    found: Tensor = small.generate(input_ids=inputs, **{**OPTIONS, **options})
    return found


@pytest.fixture(scope="module")
def first(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """What the first process leaves behind, and its tokens."""
    cache = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEEP_VARIABLE, "1")
        patch.setattr(kept_steps, "_folder", lambda: cache / "steps")
        tokens = generated(load(saved), ids())
    assert sorted(path.name.partition("-")[0] for path in (cache / "steps").iterdir()) == ["prompt", "step"]
    return cache / "steps", tokens


@pytest.fixture
def steps(first: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and from now on nothing may be traced or compiled, except for references."""
    copied = tmp_path / "steps"
    shutil.copytree(first[0], copied)
    monkeypatch.setenv(KEEP_VARIABLE, "1")
    monkeypatch.setattr(kept_steps, "_folder", lambda: copied)

    def refuse(*_: Any, **__: Any) -> None:
        raise TracedError

    monkeypatch.setattr(InductorBackend, "__call__", refuse)
    trace = DecodeSession._trace

    def trace_reference(self: DecodeSession, *args: Any) -> Any:
        return refuse() if isinstance(self._keeper, kept_steps.KeptSteps) else trace(self, *args)

    monkeypatch.setattr(DecodeSession, "_trace", trace_reference)
    return copied


def compiles(small: CompressedModel, inputs: Tensor | None = None, **options: Any) -> bool:
    """Whether a call takes the way through Dynamo."""
    try:
        generated(small, ids() if inputs is None else inputs, **options)
    except (TracedError, torch._dynamo.exc.BackendCompilerFailed, fxcompress.FxCompressError):
        return True
    return False


def test_a_later_process_compiles_nothing(saved: Path, first: tuple[Path, Tensor], steps: Path) -> None:
    small = load(saved)
    assert torch.equal(generated(small, ids()), first[1])
    assert torch.equal(generated(small, ids()), first[1])
    assert small.explain() == {**small.explain()} != {}
    assert small._compiler.measure_kernels([1])


def test_prompts_of_other_lengths_and_samples(saved: Path, steps: Path) -> None:
    small = load(saved)
    reference = load(saved)
    reference.set_backend("eager")
    for length in (2, 3, 12):
        ours = generated(small, ids(length=length), do_sample=True, top_k=5)
        assert torch.equal(ours, generated(reference, ids(length=length), do_sample=True, top_k=5))


def test_other_values_of_the_same_form(steps: Path, tmp_path: Path) -> None:
    """What is kept is code: another model of this form runs it with its own weights."""
    torch.manual_seed(5)
    model = entry(NAME).build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    small = fxcompress.compress(model, "w4a8", verify="off")
    reference = fxcompress.compress(model, "w4a8", verify="off")
    reference.set_backend("eager")
    assert torch.equal(generated(small, ids()), generated(reference, ids()))


@pytest.mark.parametrize(
    "options",
    [
        {"inputs": ids(batch=2)},
        {"inputs": ids(length=1)},
        {"max_new_tokens": 300},
    ],
    ids=["batch", "one token", "capacity"],
)
def test_calls_of_other_sizes_compile(saved: Path, steps: Path, options: dict[str, Any]) -> None:
    assert compiles(load(saved), **options)


def _hook(small: Any) -> None:
    small.model.model.layers[0].register_forward_hook(lambda *_: None)


def _attribute(small: Any) -> None:
    small.model.model.layers[1].self_attn.scaling *= 2


def _config(small: Any) -> None:
    small.model.config.rms_norm_eps = 0.5


def _training(small: Any) -> None:
    small.model.model.layers[0].train()


def _forward(small: Any) -> None:
    part = small.model.model.layers[0].mlp
    part.forward = type(part).forward.__get__(part)


def _parameter(small: Any) -> None:
    part = small.model.model.layers[0].mlp.up_proj
    part.weight = nn.Parameter(torch.randn(part.weight.shape), requires_grad=False)


def _buffer(small: Any) -> None:
    small.model.model.rotary_emb.inv_freq = small.model.model.rotary_emb.inv_freq.double()


def _part(small: Any) -> None:
    layers = small.model.model.layers
    layers[0].mlp.act_fn = nn.GELU()


CHANGES = [_hook, _attribute, _config, _training, _forward, _parameter, _buffer, _part]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True])
def test_a_changed_model_compiles(
    saved: Path, steps: Path, change: Callable[[Any], None], late: bool
) -> None:
    small = load(saved)
    if late:
        assert not compiles(small)
    change(small)
    assert compiles(small)


def test_settings_of_the_process(saved: Path, steps: Path) -> None:
    small = load(saved)
    assert not compiles(small)
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert compiles(small)
    assert compiles(load(saved))
    torch.set_num_threads(torch.get_num_threads() - 1)
    assert not compiles(small)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiles(small)


def test_code_that_was_replaced(saved: Path, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def turned(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return q, k

    from fxcompress.backends.kept_key import _code_digest

    _code_digest.cache_clear()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned)
    assert compiles(load(saved))
    _code_digest.cache_clear()


def test_files_that_were_edited(saved: Path, steps: Path) -> None:
    for plan in steps.glob("prompt-*/plan.json"):
        content = json.loads(plan.read_text())
        assert any(path.endswith("modeling_llama.py") for path in content["files"])
        content["files"][next(iter(content["files"]))] = "0" * 64
        plan.write_text(json.dumps(content))
    assert compiles(load(saved))
    assert not list(steps.glob("prompt-*"))  # made anew by whoever compiles


@pytest.mark.parametrize("damage", ["empty plan", "no block", "wrong block", "no constants", "no kernel"])
def test_damaged_steps_compile(saved: Path, steps: Path, damage: str) -> None:
    (folder,) = steps.glob("prompt-*")
    if damage == "empty plan":
        (folder / "plan.json").write_text("")
    elif damage == "no block":
        (folder / "block_0.py").unlink()
    elif damage == "wrong block":
        (folder / "block_0.py").write_text("raise RuntimeError('no')")
    elif damage == "no constants":
        (folder / "constants.safetensors").unlink()
    else:
        content = json.loads((folder / "plan.json").read_text())
        content["kernels"] = [[987654321, "gone.so"]]
        (folder / "plan.json").write_text(json.dumps(content))
    assert compiles(load(saved))


def test_nothing_is_kept_or_looked_for_on_request(
    saved: Path, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEEP_VARIABLE, "0")
    assert compiles(load(saved))


def test_a_folder_that_cannot_be_written(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[Path, Tensor]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(KEEP_VARIABLE, "1")
    monkeypatch.setattr(kept_steps, "_folder", lambda: blocked / "steps")
    assert torch.equal(generated(load(saved), ids()), first[1])


def test_an_error_while_keeping_is_none_of_the_call(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[Path, Tensor]
) -> None:
    def fail(_: Any) -> str:
        raise RuntimeError("another torch")

    monkeypatch.setenv(KEEP_VARIABLE, "1")
    monkeypatch.setattr(kept_steps, "_folder", lambda: tmp_path / "steps")
    monkeypatch.setattr(kept_steps, "guards_of", fail)
    assert torch.equal(generated(load(saved), ids()), first[1])
    assert not (tmp_path / "steps").exists()


def test_only_the_last_used_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_steps, "MOST_KEPT", 3)
    for number in range(6):
        kept_steps._write(tmp_path / f"step-{number}", {}, {}, {})
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "step-5").exists()


def test_another_process_may_be_first(tmp_path: Path) -> None:
    kept_steps._write(tmp_path / "step-1", {"who": 1}, {}, {})
    kept_steps._write(tmp_path / "step-1", {"who": 2}, {}, {})
    assert json.loads((tmp_path / "step-1" / "plan.json").read_text()) == {"who": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_watch_sees_what_changes() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    watch = ModuleWatch(module)
    assert watch.changed() is None
    module[1].eps = 1e-3
    assert watch.changed() == "eps"
    other = copy.deepcopy(module)
    watch = ModuleWatch(other)
    other[0].extra = 1  # a new attribute, which no code has read
    assert watch.changed() is None
    other[0].register_buffer("new", torch.zeros(1))
    assert watch.changed() is not None


def test_kernels_lie_in_the_cache_that_plans_name(saved: Path, steps: Path) -> None:
    (folder,) = steps.glob("step-*")
    content = json.loads((folder / "plan.json").read_text())
    assert content["kernels"]
    assert all((toolchain.cache_directory() / name).is_file() for _, name in content["kernels"])
