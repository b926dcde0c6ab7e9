"""Exported programs, compressed: weights, and keys and values that the program keeps in buffers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

import fxcompress
from fxcompress.backends.cpu import cached_attention
from fxcompress.errors import BackendError, BindingError, CaptureError, FxCompressError, RecipeError
from tests.ops.graphs import decomposes_export
from tests.zoo import entry

CAPACITY = 32
WINDOW = [{"quantize-kv-cache": {"bits": 8, "residual": CAPACITY}}]
STEPS = ((0, 7), (7, 8), (8, 9), (9, 20))


def exported(name: str) -> tuple[ExportedProgram, Tensor]:
    """A decoder of the zoo with transformers' static cache, and tokens."""
    model: Any = entry(name).build()
    model.generation_config.cache_implementation = "static"
    model.config.use_cache = True
    ids = entry(name).tensors(1, 20)["input_ids"]
    wrapped = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=CAPACITY)
    inputs = {"input_ids": ids[:, :5], "cache_position": torch.arange(5)}
    dims = {"input_ids": {1: Dim.AUTO}, "cache_position": {0: Dim.AUTO}}
    with torch.no_grad():
        return torch.export.export(wrapped.model, (), inputs, dynamic_shapes=dims, strict=False), ids


def run(program: ExportedProgram, ids: Tensor, steps: Any = STEPS) -> Tensor:
    module = program.module()
    with torch.no_grad():
        parts = [
            module(input_ids=ids[:, first:last], cache_position=torch.arange(first, last))
            for first, last in steps
        ]
    return torch.cat(parts, 1)


def buffers(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in program.module().named_buffers() if "cache" in name}


@pytest.mark.parametrize("name", ["gpt2-odd", "gpt-oss", "qwen3-moe"])
def test_a_window_longer_than_the_text_changes_nothing(name: str) -> None:
    program, ids = exported(name)
    packed = fxcompress.compress_exported(program, WINDOW)
    assert torch.equal(run(packed, ids), run(program, ids))
    left = {name.rpartition("_")[2] for name in buffers(packed) if "cumulative" not in name}
    assert left == {"packed", "length"}


def with_cache(name: str, ids: Tensor, cache: Any) -> Tensor:
    """What the original model computes with a packed cache."""
    model, parts = entry(name).build(), []
    with torch.no_grad():
        for first, last in STEPS:
            output = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
            parts.append(output.logits)
    return torch.cat(parts, 1)


def compressed(
    name: str, recipe: Any, data: Any = None, seed: int | None = None
) -> fxcompress.CompressedModel:
    model = entry(name).build() if seed is None else entry(name).build(seed)
    return fxcompress.compress(model, recipe, data, verify="off", progress=False)


def test_it_computes_what_the_packed_cache_computes() -> None:
    name = "llama-tied-odd"
    program, ids = exported(name)
    kivi = {"bits": 8, "key_axis": "channel", "group_size": 5, "residual": 5, "sinks": 2}
    recipe = [{"quantize-kv-cache": kivi}]
    packed = fxcompress.compress_exported(program, recipe)
    expected = with_cache(name, ids, compressed(name, recipe).new_cache(CAPACITY))
    torch.testing.assert_close(run(packed, ids), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, run(program, ids), atol=1e-4)
    sizes = [sum(tensor.nbytes for tensor in buffers(each).values()) for each in (packed, program)]
    assert sizes[0] < 0.8 * sizes[1]


def test_forms_come_from_a_recipe_or_from_a_compressed_model() -> None:
    name = "phi3"
    program, ids = exported(name)
    recipe = [{"quantize-weights": {"bits": 8}}, {"quantize-kv-cache": {"bits": 4}}]
    one = fxcompress.compress_exported(program, recipe)
    two = fxcompress.compress_exported(program, compressed(name, recipe))
    assert torch.equal(run(one, ids), run(two, ids))
    weights = [sum(tensor.nbytes for tensor in each.state_dict.values()) for each in (one, program)]
    assert weights[0] < 0.5 * weights[1]


def test_calibrated_forms_come_from_a_compressed_model() -> None:
    name = "phi3"
    program, ids = exported(name)
    data = [entry(name).tensors(2, 16, seed=seed) for seed in range(2)]
    for recipe in (["wkvquant"], [{"kvquant": {"bits": 4}}]):
        with pytest.raises(RecipeError, match="needs calibration data"):
            fxcompress.compress_exported(program, recipe)
        small = compressed(name, recipe, data)
        packed = fxcompress.compress_exported(program, small)
        expected = with_cache(name, ids, small.new_cache(CAPACITY))
        torch.testing.assert_close(run(packed, ids), expected, rtol=0, atol=1e-5)
    with pytest.raises(BindingError, match="values are not those"):
        fxcompress.compress_exported(program, compressed(name, WINDOW, seed=5))


def test_positions_are_obeyed() -> None:
    program, ids = exported("llama-tied-odd")
    packed = fxcompress.compress_exported(program, WINDOW)
    steps = ((0, 9), (0, 4), (4, 12), (10, 13))  # a new text; two tokens taken back
    assert torch.equal(run(packed, ids, steps), run(program, ids, steps))
    module = packed.module()
    with pytest.raises(FxCompressError, match="from place 15 on, and the cache holds 13"):
        module(input_ids=ids[:, :2], cache_position=torch.arange(15, 17))


def test_it_is_saved_and_runs_in_another_process(tmp_path: Path) -> None:
    program, ids = exported("llama-tied-odd")
    packed = fxcompress.compress_exported(program, ["quantize-weights", {"quantize-kv-cache": {"bits": 8}}])
    torch.export.save(packed, tmp_path / "decoder.pt2")
    torch.save({"ids": ids, "expected": run(packed, ids)}, tmp_path / "data.pt")
    code = f"""
import torch, fxcompress
module = torch.export.load({str(tmp_path / "decoder.pt2")!r}).module()
data = torch.load({str(tmp_path / "data.pt")!r})
with torch.no_grad():
    parts = [
        module(input_ids=data["ids"][:, a:b], cache_position=torch.arange(a, b)) for a, b in {STEPS}
    ]
torch.testing.assert_close(torch.cat(parts, 1), data["expected"], rtol=0, atol=1e-5)
print("same")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "same\n", found.stderr


# --- caches of one's own -----------------------------------------------------------------------------------

Write = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class OwnCache(nn.Module):
    """An attention whose cache is written as the test says."""

    def __init__(self, write: Write, shape: tuple[int, ...] = (2, 2, CAPACITY, 8)) -> None:
        super().__init__()
        self.write = write
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.out = nn.Linear(32, 32)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        key, value = self.write(self, position, k, v)
        mask = torch.arange(key.shape[2]) <= position[:, None]
        mixed = F.scaled_dot_product_attention(
            q, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


def _put(module: Any, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    module.keys[:, :, position] = k
    module.values[:, :, position] = v
    return module.keys, module.values


def _copy_whole(module: Any, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = module.keys.index_copy(2, position, k), module.values.index_copy(2, position, v)
    module.keys.copy_(keys)
    module.values.copy_(values)
    return keys, values


def _slice(module: Any, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    start = position[0].item()
    torch._check(start >= 0)
    torch._check(start + k.shape[2] <= CAPACITY)
    module.keys[:, :, start : start + k.shape[2]] = k
    module.values[:, :, start : start + k.shape[2]] = v
    return module.keys, module.values


def _scatter(module: Any, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    start = position[0].item()
    torch._check(start >= 0)
    torch._check(start + k.shape[2] <= CAPACITY)
    keys = torch.slice_scatter(module.keys, k, 2, start, start + k.shape[2])
    values = torch.slice_scatter(module.values, v, 2, start, start + k.shape[2])
    module.keys.copy_(keys)
    module.values.copy_(values)
    return keys, values


def _values_late(module: Any, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    module.keys.index_copy_(2, position, k)
    module.values.index_copy_(2, position, (v * 2.0).float() / 2.0)
    return module.keys, module.values


def own(write: Write, shape: tuple[int, ...] = (2, 2, CAPACITY, 8)) -> ExportedProgram:
    torch.manual_seed(0)
    module = OwnCache(write, shape).eval()
    inputs = (torch.randn(2, 3, 32), torch.arange(3))
    dims = ({1: Dim.AUTO}, {0: Dim.AUTO})
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=dims, strict=False)


def steps_of(program: ExportedProgram) -> list[Tensor]:
    module = program.module()
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [module(x[:, a:b], torch.arange(a, b)) for a, b in ((0, 5), (5, 7), (7, 20))]


@decomposes_export
@pytest.mark.filterwarnings("ignore:Raw SymInt value:UserWarning")  # torch, decomposing a slice
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("write", [_put, _copy_whole, _slice, _scatter, _values_late])
def test_caches_of_ones_own(write: Write, functional: bool) -> None:
    program = own(write)
    expected = steps_of(program)
    if functional:
        program = own(write).run_decompositions({})
    packed = fxcompress.compress_exported(program, WINDOW)
    for one, two in zip(steps_of(packed), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6 if functional else 0)
    assert "keys_packed" in dict(packed.named_buffers())
    assert "keys" not in dict(packed.named_buffers())


def test_compiled_attention_reads_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are packed already lie in the graph, and stay what they are there."""
    fused: list[Any] = []
    original = cached_attention.Fused.run

    def noted(self: Any, node: Any, value_of: Any) -> Tensor:
        fused.append(node)
        return original(self, node, value_of)

    monkeypatch.setattr(cached_attention.Fused, "run", noted)
    program, ids = exported("llama")
    packed = fxcompress.compress_exported(
        program, [{"quantize-weights": {"bits": 8}}, {"quantize-kv-cache": {"bits": 8}}]
    )
    compiled = torch.compile(packed.module(), backend="fxcompress", options={"recipe": None})
    with torch.no_grad():
        found = [
            compiled(input_ids=ids[:, a:b], cache_position=torch.arange(a, b)) for a, b in ((0, 7), (7, 20))
        ]
    assert fused
    expected = run(packed, ids, ((0, 7), (7, 20)))
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-5)


def _rolling(module: Any, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    module.keys.copy_(torch.cat([module.keys, k], 2)[:, :, -CAPACITY:])
    module.values.copy_(torch.cat([module.values, v], 2)[:, :, -CAPACITY:])
    return module.keys, module.values


def _twice(module: Any, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _put(module, position, k, v)
    return _put(module, position, k, v)


def _none(module: Any, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    pad = (0, 0, 0, CAPACITY - 20)
    return F.pad(k, pad), F.pad(v, pad)


@pytest.mark.parametrize(
    ("write", "message"),
    [(_rolling, "before the new tokens"), (_twice, "written more than once"), (_none, "kept in no buffer")],
)
def test_what_cannot_be_replaced_is_named(write: Write, message: str) -> None:
    with pytest.raises(BackendError, match=f"v.weight: .*{message}"):
        fxcompress.compress_exported(own(write), WINDOW)


def test_bad_input() -> None:
    program = own(_put)
    with pytest.raises(CaptureError, match="expected an exported program"):
        fxcompress.compress_exported(nn.Linear(2, 2), WINDOW)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="cuts the model"):
        fxcompress.compress_exported(program, ["remove-blocks"])
    program.example_inputs = None
    with pytest.raises(CaptureError, match="no example inputs"):
        fxcompress.compress_exported(program, WINDOW)
