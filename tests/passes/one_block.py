"""A BlockContext over a whole small model, computed by interpreting its graph once per question."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.analysis.edges import Edge, find_edges
from fxcompress.analysis.sites import Site, find_sites
from fxcompress.calibration.statistics import ActivationStatistics, as_tokens
from fxcompress.capture.export import capture_model
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState, Edit, Refuse, SetWeight
from fxcompress.ops import apply_transforms
from fxcompress.pass_base import BlockFunction, Pass, Statistics

Inputs = tuple[Any, ...]


_captured: dict[Hashable, Program] = {}


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, wanted: Sequence[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = {node.name for node in wanted}
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = value
        return value


class OneBlock:
    """One block that holds all sites, or those ``only`` accepts.

    Args:
        program: The captured model.
        inputs: Flat model inputs of each calibration batch.
        only: Which sites lie in the block.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Inputs] = (),
        only: Callable[[Site], bool] = lambda site: True,
    ) -> None:
        self.program = program
        self.state = CompressionState(program.weights)
        self.index = 0
        self.name = "block 1/1"
        self.data = list(inputs)
        self.sites = [site for site in find_sites(program) if only(site)]
        self.generator = torch.Generator().manual_seed(0)
        self.asked: list[tuple[str, ...]] = []
        self.survey: Any = None

    def weight(self, name: str) -> Tensor:
        return self.state.weight(name)

    def statistics(self, sites: Sequence[Site], *, gram: bool = False) -> dict[str, Statistics]:
        found: dict[str, ActivationStatistics] = {}
        self.asked.append(tuple(site.name for site in sites))
        for site in sites:
            assert site.input is not None
            if site.input.name in found:
                continue
            found[site.input.name] = ActivationStatistics(site.name, gram=gram)
            for value in self.batches(site):
                found[site.input.name].update(as_tokens(site, value))
        return dict(found)

    def batches(self, site: Site) -> Iterator[Tensor]:
        assert site.input is not None
        for inputs in self.inputs([site]):
            yield inputs[site.input.name]

    @property
    def edges(self) -> list[Edge]:
        return find_edges(self.program)

    def edge_statistics(self, edges: Sequence[Edge]) -> dict[Edge, Statistics]:
        found: dict[Edge, Statistics] = {}
        for edge in edges:
            statistics = ActivationStatistics(edge.anchor)
            for inputs in self.data:
                x = self.values(inputs, [edge.value])[edge.value.name]
                statistics.update(x.reshape(-1, x.shape[-1]))
            found[edge] = statistics
        return found

    def blocks(self) -> Iterator[OneBlock]:
        yield self

    def function(self) -> BlockFunction:
        raise NotImplementedError("run passes that optimise a block through run_recipe")

    def inputs(self, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
        form = {site.input: self.state.form(site.name) for site in sites if site.input is not None}
        for inputs in self.data:
            values = self.values(inputs, list(form))
            yield {node.name: apply_transforms(values[node.name], form[node].transform_in) for node in form}

    def values(self, inputs: Inputs, wanted: Sequence[fx.Node]) -> dict[str, Any]:
        """Values of graph nodes with all edits so far."""
        program, recorder = self.program, Recorder(self.program.graph_module, wanted)
        given = dict(zip(program.inputs, inputs, strict=True))
        call = []
        for node in program.placeholders():
            name = program.weight_of.get(node.name)
            call.append(given[node.name] if name is None else self.dense(name))
        with torch.no_grad():
            recorder.run(*call)
        return recorder.seen

    def dense(self, name: str) -> Tensor:
        return self.state.effective(name) if name in self.program.parameters else self.program.weights[name]

    def run(self, method: Pass) -> list[Edit]:
        """Run a pass and apply its edits as the manager does."""
        edits = []
        model: Any = self  # the whole model is one block
        self.survey = method.survey(model)
        for edit in method.solve(self):
            self.state.apply(edit, method.name)
            edits.append(edit)
        return edits


def block_of(model: nn.Module, *inputs: Inputs, only: Callable[[Site], bool] = lambda site: True) -> OneBlock:
    """Capture ``model`` with the first of ``inputs``; the block calibrates on all of them.

    Passes change nothing they are given, so equal models share one capture, whose weights are seeded here.
    """
    key = (
        type(model),
        tuple((name, value.dtype) for name, value in model.named_parameters()),
        tuple(value.shape for value in inputs[0]),
    )
    if key not in _captured:
        draw = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # equal whatever ran before
            spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * spread)
        _captured[key] = capture_model(model.eval(), inputs[0])
    return OneBlock(_captured[key], inputs, only)


def refusals(edits: Sequence[Edit]) -> dict[str, str]:
    return {edit.name: edit.reason for edit in edits if isinstance(edit, Refuse)}


def compressed(edits: Sequence[Edit]) -> list[str]:
    return [edit.name for edit in edits if isinstance(edit, SetWeight)]
