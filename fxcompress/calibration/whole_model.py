"""The whole model as a pass sees it before its first block is solved, and as a differentiable function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.calibration.context import Context, Feed
from fxcompress.calibration.inputs import CalibrationData
from fxcompress.calibration.plan import Plan
from fxcompress.calibration.signature import CallSignature
from fxcompress.calibration.walk import BlockRunner, Values, Walk
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError
from fxcompress.progress import ProgressOption

__all__ = ["ProgramModel", "SurveyModel"]


class ProgramModel:
    """The manager's :class:`fxcompress.pass_base.ModelFunction`: the model on its calibration batches.

    Values before a block are kept per batch until the block changes, so that trying many tensors of one block
    runs what lies behind it only.

    Args:
        plan: The program's plan.
        walk: At the start.
        state: Edits to compute with; not read again once a batch has run.
        where: For messages.
    """

    def __init__(self, plan: Plan, walk: Walk, state: CompressionState, where: str) -> None:
        self._plan, self._walk, self._state, self._where = plan, walk, state, where
        signature = CallSignature(plan.program)
        self._tokens = list(signature.vocabularies)
        self._vocabulary = {found.rows for found in signature.vocabularies.values()}
        self._originals: dict[int, Tensor] = {}
        self._prefix: dict[int, tuple[int, Values]] = {}  # batch → block, values in front of it
        self._first = {
            name: min(plan.block_of[user] for node in nodes for user in node.users if user in plan.block_of)
            for name, nodes in self._holders().items()
        }

    def _holders(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name in self._plan.program.parameters:
            nodes = [node for node in self._plan.program.weight_node(name) if node.users]
            if any(user in self._plan.block_of for node in nodes for user in node.users):
                found[name] = nodes
        return found

    @property
    def batches(self) -> int:
        """Number of calibration batches."""
        return len(self._walk.inputs)

    def __call__(self, batch: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The main output (scores over the vocabulary if there are any) with ``tensors`` for parameters."""
        given = dict(tensors or {})
        unknown = [name for name in given if name not in self._first]
        if unknown:
            raise CalibrationError(f"{self._where}: {unknown[0]} is no parameter that the model uses.")
        start = min((self._first[name] for name in given), default=0)
        values = self._before(batch, start)
        for index in range(start, len(self._plan.blocks)):
            values = self._step(values, batch, index, given)
        return self._main(values, batch)

    def original(self, batch: int) -> Tensor:
        """The main output without ``tensors``."""
        if batch not in self._originals:
            with torch.no_grad():
                self._originals[batch] = self(batch)
        return self._originals[batch]

    def divergence(self, batch: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Mean KL divergence per token in nats from the unchanged model; without scores ``‖y − ŷ‖²/‖y‖²``."""
        y, z = self.original(batch).double(), self(batch, tensors).double()
        if not self._scored(y):
            return (y - z).square().sum() / y.square().sum().clamp_min(1e-300)
        p, q = torch.log_softmax(y, -1), torch.log_softmax(z, -1)
        return (p.exp() * (p - q)).sum(-1).mean()

    def loss(self, batch: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean next-token loss in nats, the labels being the calibration tokens themselves.

        Raises:
            CalibrationError: the outputs are no scores for the next one of the input tokens.
        """
        scores = self(batch, tensors)
        for name in self._tokens:
            ids = self._walk.inputs[batch][self._plan.inputs[name]]
            if self._scored(scores) and ids.shape == scores.shape[:-1] and ids.shape[-1] > 1:
                return F.cross_entropy(scores[..., :-1, :].flatten(0, -2).float(), ids[..., 1:].flatten())
        raise CalibrationError(
            f"{self._where}: the model gives no scores for the token after each of its inputs, so its inputs"
            " are no labels.",
        )

    def sampled_loss(
        self, batch: int, generator: torch.Generator, tensors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Negative log-likelihood of an output drawn from the model's own distribution, per token.

        The gradient's mean square over draws is the Fisher information. Scores are a softmax; any other
        output counts as the mean of a normal distribution with variance 1.
        """
        output = self(batch, tensors)
        if self._scored(output):
            flat = output.flatten(0, -2).float()
            chosen = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
            return F.cross_entropy(flat, chosen)
        noise = torch.randn(output.shape, generator=generator).to(output)
        return -(output * noise).sum() / max(1, output[..., 0].numel())

    def _scored(self, output: Tensor) -> bool:
        return output.dim() >= 2 and output.shape[-1] in self._vocabulary

    def _before(self, batch: int, start: int) -> Values:
        """Values in front of a block under the plain state."""
        index, values = self._prefix.get(batch, (0, {}))
        if index > start:
            index, values = 0, {}
        with torch.no_grad():
            for block in range(index, start):
                values = self._step(values, batch, block, None)
        if start:
            self._prefix[batch] = (start, values)
        return values

    def _step(self, values: Values, batch: int, index: int, tensors: Mapping[str, Tensor] | None) -> Values:
        keep = self._plan.keep[index]
        runner = BlockRunner(self._plan, index, self._state, tensors=tensors)
        computed = [node for node in runner.block.nodes if node in keep]
        new = runner.run(self._walk.inputs[batch] | values, computed)
        return {node: value for node, value in values.items() if node in keep} | new

    def _main(self, values: Values, batch: int) -> Tensor:
        env = self._walk.inputs[batch] | values
        flat = self._plan.output.args[0]
        nodes = flat if isinstance(flat, list | tuple) else [flat]
        found = [env[node] for node in nodes if isinstance(node, torch.fx.Node) and node in env]
        floating = [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]
        if not floating:
            raise CalibrationError(f"{self._where}: the model has no floating-point output.")
        scores = [value for value in floating if self._scored(value)]
        return (scores or floating)[0]


class SurveyModel:
    """The manager's :class:`fxcompress.pass_base.SurveyContext`.

    Args:
        plan: The program's plan.
        state: Edits of the passes before; nothing changes it.
        batches: Flat calibration batches, or None.
        pass_name: Who asks, for messages.
        seed: Seed of :attr:`generator`.
        data: What the batches are of.
        original: The program before any cut; default that of the plan.
        folder: For checkpoints of long work.
        progress: Told of its steps.
    """

    def __init__(
        self,
        plan: Plan,
        state: CompressionState,
        batches: list[Any] | None,
        pass_name: str,
        seed: int,
        *,
        data: CalibrationData | None = None,
        original: Program | None = None,
        folder: Path | None = None,
        progress: ProgressOption = False,
    ) -> None:
        self.program, self.state = plan.program, state
        self.original, self.data = original or plan.program, data
        self.folder, self.progress = folder, progress
        self.generator = torch.Generator().manual_seed(seed)
        self._plan, self._batches, self._pass_name, self._seed = plan, batches, pass_name, seed

    def blocks(self) -> Iterator[Context]:
        """Every block in order, as the passes before left the model; one block's values at a time."""
        batches = self._batches
        feed = Feed(None if batches is None else partial(Walk, self._plan, batches))
        for index in range(len(self._plan.blocks)):
            yield Context(self._plan, index, self.state, feed, self._pass_name, self._seed)
            feed.finish_block(self.state)

    def function(self) -> ProgramModel:
        """The model as a differentiable function of its parameters on the calibration batches.

        Raises:
            CalibrationError: there are no calibration data.
        """
        where = f"pass {self._pass_name!r}"
        if self._batches is None:
            raise CalibrationError(
                f"{where}: the model was to be run, but there are no calibration data.",
                fix="pass calibration=….",
            )
        return ProgramModel(self._plan, Walk(self._plan, self._batches), self.state, where)
