"""Dynamo frontend: names from source paths, state told from inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress.analysis.sites import SiteKind, find_sites
from fxcompress.capture import Program, program_from_dynamo
from fxcompress.capture.dynamo import qualified_name
from tests.zoo import entry


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['model']._modules['0']._parameters['weight']", "model.0.weight"),
        ("L['self']._modules['_orig_mod']._modules['a']._parameters['b']", "a.b"),
        ("G['model']._modules['layers']._modules['11']._buffers['mean']", "layers.11.mean"),
        ("L['self'].embed.weight", "embed.weight"),
        ("L['models'][1]._parameters['w']", "1.w"),
    ],
)
def test_names_from_source_paths(source: str, name: str) -> None:
    assert qualified_name(source) == name


class Recorder:
    def __init__(self) -> None:
        self.programs: list[Program] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.programs.append(program_from_dynamo(module, inputs))
        return module.forward


def test_same_dialect_and_names_as_export() -> None:
    animal = entry("llama")
    model, recorder = animal.build(), Recorder()
    with torch.no_grad():
        torch.compile(model, backend=recorder)(**animal.inputs())
    (program,) = recorder.programs
    assert program.parameters == frozenset(dict(model.named_parameters()))
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.aten.linear.default in targets
    assert torch.ops.aten.scaled_dot_product_attention.default in targets


def test_global_model_in_a_step_function() -> None:
    recorder = Recorder()
    holder = {"net": nn.Linear(4, 3)}

    def step(x: Tensor) -> Tensor:
        return holder["net"](x) + 1

    with torch.no_grad():
        torch.compile(step, backend=recorder)(torch.randn(2, 4))
    assert {name.split(".")[-1] for name in recorder.programs[0].parameters} == {"weight", "bias"}


def test_scan_models_are_traced_without_lost_values() -> None:
    animal = entry("mamba")
    model, recorder = animal.build(), Recorder()
    with torch.no_grad():
        expected = model(**animal.inputs()).logits
        torch.compile(model, backend=recorder)(**animal.inputs())
    program = recorder.programs[0]
    values = [animal.inputs()["input_ids"]] if len(program.inputs) == 1 else None
    assert values is not None
    torch.testing.assert_close(program.run_flat(values)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_matrix_stays_one_when_activations_are_strided() -> None:
    """Tracing spells ``linear`` of strided activations as a batched product with the expanded weight."""
    model = nn.Linear(6, 4, bias=False)
    recorder = Recorder()

    def step(x: Tensor) -> Tensor:
        return model(x[:, -1:])

    torch.compile(step, backend=recorder, dynamic=False)(torch.randn(2, 5, 6))
    (program,) = recorder.programs
    (site,) = find_sites(program)
    assert site.kind is SiteKind.LINEAR
    assert not any(n.target is torch.ops.aten.bmm.default for n in program.graph.nodes)
    x = torch.randn(2, 5, 6)
    given = [model.weight if n.name in program.weight_of else x for n in program.placeholders()]
    torch.testing.assert_close(program.graph_module(*given)[0], step(x))
