"""Attention over a growing cache as ONNX Runtime's fused operator, and where it stays plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress.backends.onnx.grouped_attention import fuse_attention
from fxcompress.backends.onnx.operators import ops
from fxcompress.capture import capture_model
from fxcompress.errors import BackendError
from tests.backends.onnx_models import compressed
from tests.backends.test_onnx_decoders import Runner
from tests.zoo import entry


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    inputs = entry("llama").inputs()
    small = compressed(entry("llama").build(), "w8a8", inputs)
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    report = small.export_onnx(path, cache=True, example_inputs=inputs)
    small.set_backend("eager")
    return small, path, report


def test_every_layer_is_fused(exported: tuple[Any, Path, Any]) -> None:
    small, _, report = exported
    assert report.kernels["GroupQueryAttention"] == small.config.num_hidden_layers
    assert report.kernels["RotaryEmbedding"] == 2 * small.config.num_hidden_layers
    assert [p.inputs for p in report.parity][:2] == ["one example input", "prompt"]


def test_pieces_of_a_prompt_and_padding(exported: tuple[Any, Path, Any]) -> None:
    small, path, _ = exported
    runner = Runner(path)
    ids = torch.arange(12).reshape(2, 6) * 5 % 40 + 1
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # the second sequence is shorter, padded on the left
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    want = small(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    seen = mask.bool()
    first, past = runner.logits(ids[:, :4], mask[:, :4], None)
    parts = [first]
    for index in range(4, 6):  # in a batch, one token at a time
        logits, past = runner.logits(ids[:, index : index + 1], mask[:, : index + 1], past)
        parts.append(logits)
    found = torch.cat(parts, 1)
    assert (found - want)[seen].norm() <= 0.02 * want[seen].norm()
    one = mask[:1]
    _, past = runner.logits(ids[:1, :2], one[:, :2], None)
    rest, _ = runner.logits(ids[:1, 2:], one, past)  # several at once, of one sequence
    assert (rest - want[:1, 2:]).norm() <= 0.02 * want[:1, 2:].norm()


def test_greedy_tokens_of_plain_onnxruntime_and_genai(exported: tuple[Any, Path, Any]) -> None:
    small, path, _ = exported
    ids = torch.tensor([[3, 9, 27, 5]])
    mask = torch.ones_like(ids)
    want = small.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    assert Runner(path).generate(ids, mask, 8).tolist() == want.tolist()
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(model := onnxruntime_genai.Model(str(path.parent)))
    parameters.set_search_options(max_length=12, min_length=12, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(map(int, generator.get_sequence(0))) == want[0].tolist()


def test_plain_attention_continues_batches(tmp_path: Path) -> None:
    inputs = entry("llama").inputs()
    small = compressed(entry("llama").build(), "w8a16", inputs)
    report = small.export_onnx(tmp_path / "m.onnx", cache=True, example_inputs=inputs, attention="plain")
    assert "GroupQueryAttention" not in report.kernels
    assert "RotaryEmbedding" not in report.kernels
    assert report.parity[0].inputs == "example inputs"
    runner = Runner(tmp_path / "m.onnx")
    ids = torch.arange(12).reshape(2, 6) + 1
    _, past = runner.logits(ids[:, :2], torch.ones(2, 2).long(), None)
    runner.logits(ids[:, 2:], torch.ones(2, 6).long(), past)
    with pytest.raises(BackendError, match="'fused' or 'plain'"):
        small.export_onnx(tmp_path / "n.onnx", cache=True, example_inputs=inputs, attention="flash")


class Attends(nn.Module):
    """One attention over a growing cache; ``later`` more keys are seen than a causal mask shows."""

    def __init__(self, later: int, groups: int, floating: bool, width: int) -> None:
        super().__init__()
        self.later, self.groups, self.floating, self.width = later, groups, floating, width

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> list[Tensor]:
        q = q.reshape(q.shape[0], 2 * self.groups, -1, self.width)  # as projections would show it
        k, v = (t.reshape(t.shape[0], 2, -1, self.width) for t in (k, v))
        keys, values = torch.cat([past_k, k], dim=-2), torch.cat([past_v, v], dim=-2)
        total, past = keys.shape[2], past_k.shape[2]
        seen = torch.arange(total)[None, :] <= (torch.arange(k.shape[2]) + past + self.later)[:, None]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if self.floating else seen
        many = [
            t[:, :, None].expand(-1, -1, self.groups, -1, -1).reshape(t.shape[0], -1, total, t.shape[3])
            for t in (keys, values)
        ]
        y = nn.functional.scaled_dot_product_attention(q, *many, attn_mask=mask[None, None], scale=0.3)
        return [y, keys, values]


def inputs_of(width: int, kv: int, groups: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (kv * groups, 3), "k": (kv, 3), "v": (kv, 3), "past_k": (kv, 5), "past_v": (kv, 5)}
    return {
        name: torch.randn(batch, heads, tokens, width, generator=generator)
        for name, (heads, tokens) in shapes.items()
    }


@pytest.mark.parametrize(
    ("later", "groups", "floating", "width", "fused"),
    [
        (0, 3, False, 16, 1),
        (0, 1, True, 8, 1),
        (0, 2, True, 24, 1),
        (1, 3, False, 16, 0),  # sees the next token
        (0, 3, False, 12, 0),  # a head size the operator does not take
    ],
)
def test_what_is_fused_computes_the_same(
    later: int, groups: int, floating: bool, width: int, fused: int
) -> None:
    model, given = Attends(later, groups, floating, width), inputs_of(width, 2, groups)
    program = capture_model(model, (), given)
    want = model(**given)
    graph = program.graph_module.graph
    assert fuse_attention(graph, [dict(zip(program.inputs, given.values(), strict=True))]) == fused
    graph.eliminate_dead_code()
    graph.lint()
    found = fx.GraphModule(program.graph_module, graph)(*given.values())
    for one, two in zip(found, want, strict=True):
        torch.testing.assert_close(one, two)
    assert sum(node.target is ops.grouped_attention.default for node in graph.nodes) == fused
