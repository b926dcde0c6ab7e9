"""ONNX export of decoders with a cache: one token after the other as all at once, padding, and generators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import fxcompress
from fxcompress.apply import apply_state
from fxcompress.backends.onnx.export import run_applied
from fxcompress.backends.onnx.parity import widened
from fxcompress.backends.onnx.report import Parity
from fxcompress.capture import capture_model
from fxcompress.errors import BackendError
from tests.backends.onnx_models import compressed
from tests.zoo import entry


class Runner:
    """Greedy decoding with plain ONNX Runtime, as Optimum's classes do it: by the names alone."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.past = {
            value.name: value
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def logits(self, ids: Tensor, mask: Tensor, past: dict[str, Any] | None) -> tuple[Tensor, dict[str, Any]]:
        batch = ids.shape[0]
        if past is None:
            past = {
                name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
                for name, value in self.past.items()
            }
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        found = self.session.run(None, {name: value.numpy() for name, value in feeds.items()} | past)
        grown = dict(zip(self.outputs, found, strict=True))
        return torch.from_numpy(grown.pop("logits")), {
            name.replace("present", "past_key_values"): value for name, value in grown.items()
        }

    def generate(self, ids: Tensor, mask: Tensor, count: int) -> Tensor:
        past, new = None, ids
        for _ in range(count):
            logits, past = self.logits(new, mask, past)
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        return ids


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    inputs = entry("llama-tied-odd").inputs()
    small = compressed(entry("llama-tied-odd").build(), "w8a16", inputs)
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    report = small.export_onnx(path, cache=True, example_inputs=inputs)
    small.set_backend("eager")
    return small, path, report


def test_names_and_trials(exported: tuple[Any, Path, Any]) -> None:
    _, path, report = exported
    assert [p.inputs for p in report.parity] == [
        "one example input",
        "prompt",
        "decode step",
        "padded decode step",
    ]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert inputs["input_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"][0] == "batch"
    assert inputs["past_key_values.0.key"][2] == "past_sequence"
    assert [o.name for o in session.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]


def test_one_by_one_equals_all_at_once_with_padding(exported: tuple[Any, Path, Any]) -> None:
    small, path, _ = exported
    runner = Runner(path)
    ids = torch.arange(12).reshape(2, 6) * 5 % 40 + 1
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # the second sequence is shorter, padded on the left
    past, parts = None, []
    for index in range(ids.shape[1]):
        logits, past = runner.logits(ids[:, index : index + 1], mask[:, : index + 1], past)
        parts.append(logits)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    want = small(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    found = torch.cat(parts, 1)
    seen = mask.bool()
    assert (found - want)[seen].norm() <= 0.03 * want[seen].norm()


def test_greedy_tokens_of_plain_onnxruntime_and_genai(exported: tuple[Any, Path, Any]) -> None:
    small, path, _ = exported
    ids = torch.tensor([[3, 9, 27, 5]])
    mask = torch.ones_like(ids)
    want = small.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    assert Runner(path).generate(ids, mask, 8).tolist() == want.tolist()
    settings = json.loads((path.parent / "genai_config.json").read_text(encoding="utf-8"))
    assert settings["model"]["decoder"]["num_hidden_layers"] == small.config.num_hidden_layers
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(path.parent))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=12, min_length=12, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(map(int, generator.get_sequence(0))) == want[0].tolist()


@pytest.mark.parametrize("name", ["t5", "mamba", "bert"])
def test_models_without_such_a_cache_are_refused(name: str, tmp_path: Path) -> None:
    animal = entry(name)
    small = compressed(animal.build(), "w8a16", animal.inputs())
    with pytest.raises(BackendError, match=r"cache=False"):
        small.export_onnx(tmp_path / "m.onnx", cache=True, example_inputs=animal.inputs())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "recipe"), [("bert", "w8a8"), ("vit", "w4a16"), ("t5", "w8a16"), ("mixtral", "w8a16")]
)
def test_other_structures_export_and_match(name: str, recipe: str, tmp_path: Path) -> None:
    animal = entry(name)
    small: fxcompress.CompressedModel = compressed(animal.build(), recipe, animal.inputs())
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=animal.inputs())
    assert max(p.relative for p in report.parity) < 0.05
    assert {"MatMulNBits", "MatMulIntegerToFloat"} & set(report.kernels), report


class Deep(torch.nn.Module):
    """Many rounded layers without a norm between: noise grows as it would in a large model."""

    def __init__(self, layers: int = 60, width: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        for layer in self.layers:
            layer.weight.data = 3 * torch.randn(width, width, generator=generator) / width**0.5
            layer.bias.data.zero_()
        self.gain = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_model_that_amplifies_noise_is_held_to_its_own(tmp_path: Path) -> None:
    given = {"x": torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1))}
    small = compressed(Deep().eval(), "w8a8", given)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=given)
    assert max(part.relative for part in report.parity) < 1.5
    module = Deep().eval()
    program = capture_model(module, (), given)
    forms = small._store.state
    applied, flat = apply_state(program, forms), [given["x"] * 1.7]
    same, moved = (run_applied(applied, forms, flat, noise=noise)[0] for noise in (0.0, 1e-5))
    assert torch.equal(same, run_applied(applied, forms, flat)[0])
    assert float((same - moved).norm() / same.norm()) > 0.05
    narrow = (1e-3, 1e-4)
    noise = Parity("noise", 0.1, 0.02, 3e-4, 1.0)
    assert widened(narrow, noise) == pytest.approx((0.06, 9e-4))
    assert widened(narrow, Parity("noise", 0.0, 0.0, None, None)) == narrow


def test_quantized_caches_are_refused(tmp_path: Path) -> None:
    inputs = entry("llama").inputs()
    small = compressed(entry("llama").build(), [{"quantize-kv-cache": {"bits": 8}}], inputs)
    with pytest.raises(BackendError, match=r"quantized cache, which has no ONNX form"):
        small.export_onnx(tmp_path / "m.onnx", cache=True, example_inputs=inputs)
    assert not (tmp_path / "m.onnx").exists()
