"""The loss of the whole model on calibration data: without some blocks, and its gradients block by block.

Structural methods ask what the model as a whole loses. A model that predicts the next token has the loss it
was trained with; any other one is asked how much its outputs change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxcompress.analysis.bypass import find_bypass
from fxcompress.analysis.site_types import SiteKind
from fxcompress.calibration.plan import Plan
from fxcompress.calibration.walk import BlockRunner, Values, Walk
from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError

__all__ = ["ModelLoss"]

_STREAM_TOKENS = 512
_CAUSAL = 1e-4  # largest relative change of earlier logits when a later token changes, in float32

Loss: TypeAlias = "Callable[[int, Mapping[fx.Node, Any], Sequence[Any]], Tensor]"
"""``(batch number, user inputs, flat outputs) → scalar``."""


class ModelLoss:
    """The manager's :class:`fxcompress.pass_base.WholeModel`.

    Args:
        plan: The program's plan.
        state: The run's state.
        start: Starts a walk at the program's inputs, in float64 when told so.
        samples: Calibration batches to use, spread evenly; None uses all.
        seed: Of the random directions in which a model without next tokens is asked for its sensitivity.
    """

    def __init__(
        self,
        plan: Plan,
        state: CompressionState,
        start: Callable[[bool], Walk],
        samples: int | None,
        seed: int,
    ) -> None:
        self._plan, self._state, self._make, self._samples, self._seed = plan, state, start, samples, seed

    @cached_property
    def predicts_tokens(self) -> bool:
        """Whether the loss is that of the next token: the model is causal and returns a score per token."""
        return self._next_token is not None

    def value(self) -> float:
        """The loss of the model as it is: mean negative log-likelihood of the next token.

        For a model that predicts none: 0, as :meth:`without_each` measures against it.
        """
        walk = self._start()
        self._finish(walk, self._state)
        return self._measure(walk, walk.outputs())

    def without_each(self, names: Sequence[str]) -> list[float]:
        """The loss when one block is stepped over, for each of the blocks that own the parameters ``names``.

        For a model that predicts no tokens: the relative change of its outputs. The blocks in front of a
        removed one are not run again, so ``n`` blocks cost about ``n / 2`` runs of the model.
        """
        whole = self._start()
        walk = copy.copy(whole)
        self._finish(whole, self._state)
        reference = whole.outputs()
        found: dict[str, float] = {}
        for index in range(len(self._plan.blocks)):
            for name in names:
                without = self._state.copy()
                without.removed = (*without.removed, name)
                if self._plan.bypass(index, (name,)) is not None:
                    rest = copy.copy(walk)
                    self._finish(rest, without)
                    found[name] = self._measure(rest, reference)
            walk.advance(self._state)
        return [found[name] for name in names]

    def streams(self) -> list[tuple[Tensor, Tensor] | None]:
        """What enters and leaves each block, ``[tokens, width]`` float32 each; None where it has no bypass.

        At most 512 tokens, spread evenly over the batches.
        """
        walk = self._start()
        found: list[tuple[Tensor, Tensor] | None] = []
        for index in range(len(self._plan.blocks)):
            bypass = find_bypass(self._plan.program, self._plan.blocks, index)
            before = [inputs | values for inputs, values in zip(walk.inputs, walk.values, strict=True)]
            walk.advance(self._state)
            if isinstance(bypass, str):
                found.append(None)
                continue
            pairs = [(new, old) for new, old in bypass.values.items() if _is_floating(new)]
            ends = [
                (_rows(env[old]), _rows(values[new]))
                for env, values in zip(before, walk.values, strict=True)
                for new, old in pairs
                if new in values
            ]
            found.append(_spread(ends))
        return found

    def gradients(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The gradient of every batch's loss with respect to parameters: each name once per batch.

        Backpropagation goes block by block and runs each block again, so that memory holds what lies between
        the blocks of one batch, the graph of one block and the gradients of its parameters. Models in half
        precision are run in float64, whose gradients do not vanish.

        Yields:
            ``(name, gradient)``, float32 (float64 for half-precision models), shaped like the parameter.

        Raises:
            CalibrationError: no data, NaN or inf in a gradient.
        """
        wanted = frozenset(names)
        double = any(self._state.weights[name].element_size() < 4 for name in wanted)
        last_block = self._first_uses(wanted)
        walk = self._start(double)
        for batch in range(len(walk.inputs)):
            yield from self._backward(batch, walk, wanted, last_block)

    # --- one batch, forward and backward -------------------------------------------------------------------

    def _backward(
        self, batch: int, start: Walk, wanted: frozenset[str], first_use: Mapping[str, int]
    ) -> Iterator[tuple[str, Tensor]]:
        walk = copy.copy(start)
        walk.inputs, walk.values = [start.inputs[batch]], [start.values[batch]]
        entries: list[Values] = []
        for _ in self._plan.blocks:
            entries.append(walk.values[0])
            walk.advance(self._state)
        cotangents = self._output_gradients(batch, walk)
        pending: dict[str, Tensor] = {}
        for index in reversed(range(len(self._plan.blocks))):
            values = walk.inputs[0] | entries.pop()
            for name, gradient in self._block_gradients(index, values, cotangents, wanted, walk.double):
                pending[name] = pending[name] + gradient if name in pending else gradient
            for name in [name for name in wanted if first_use[name] == index]:
                total = pending.pop(name) if name in pending else self._zero(name, walk.double)
                if not bool(torch.isfinite(total).all()):
                    raise CalibrationError(
                        f"{name}: the gradient of the loss has NaN or inf (batch {batch + 1}).",
                        fix="check the inputs and the model's numeric range.",
                    )
                yield name, total

    def _zero(self, name: str, double: bool) -> Tensor:
        weight = self._state.effective(name)
        return torch.zeros_like(weight, dtype=torch.float64 if double else None)

    def _output_gradients(self, batch: int, walk: Walk) -> dict[fx.Node, Tensor]:
        """Gradients of the loss with respect to the values the graph returns."""
        nodes = list(self._plan.output.all_input_nodes)
        values = walk.inputs[0] | walk.values[0]
        leaves = {n: values[n].detach().requires_grad_() for n in nodes if _is_float(values.get(n))}
        with torch.enable_grad():
            flat = fx.node.map_arg(self._plan.output.args[0], lambda node: leaves.get(node, values.get(node)))
            loss = self._loss(batch, walk.inputs[0], list(flat) if isinstance(flat, tuple | list) else [flat])
            found: Sequence[Tensor | None] = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True
            )
        return {node: g for node, g in zip(leaves, found, strict=True) if g is not None}

    def _block_gradients(
        self,
        index: int,
        values: Values,
        cotangents: dict[fx.Node, Tensor],
        wanted: frozenset[str],
        double: bool,
    ) -> Iterator[tuple[str, Tensor]]:
        """Gradients of one block's parameters; moves ``cotangents`` from its outputs to its inputs."""
        plan, block = self._plan, self._plan.blocks[index]
        bypass = plan.bypass(index, self._state.removed)
        if bypass is not None:
            for new, old in bypass.items():
                if new in cotangents:
                    _add(cotangents, old, cotangents.pop(new))
            return
        members = set(block.nodes)
        ends = [node for node in cotangents if node in members]
        names = {plan.program.weight_of[n.name] for n in block.inputs if n.name in plan.program.weight_of}
        weights = {name: self._leaf(name, double) for name in sorted(names & wanted)}
        leaves = {
            node: values[node].detach().requires_grad_()
            for node in block.inputs
            if node in plan.block_of and _is_float(values.get(node))
        }
        with torch.enable_grad():
            runner = BlockRunner(plan, index, self._state, double=double, tensors=weights)
            out = runner.run(values | leaves, ends)
            reached = [node for node in ends if out[node].requires_grad]
            sources = [*weights.values(), *leaves.values()]
            given = [cotangents.pop(node) for node in ends]
            if not reached or not sources:
                return
            directions = [g for node, g in zip(ends, given, strict=True) if out[node].requires_grad]
            found = torch.autograd.grad(
                [out[node] for node in reached], sources, directions, allow_unused=True
            )
        for node, gradient in zip(leaves, found[len(weights) :], strict=True):
            if gradient is not None:
                _add(cotangents, node, gradient)
        for name, gradient in zip(weights, found, strict=False):
            if gradient is not None:
                yield name, gradient

    def _leaf(self, name: str, double: bool) -> Tensor:
        weight = self._state.effective(name).detach()
        return (weight.to(torch.float64) if double else weight).requires_grad_()

    def _first_uses(self, wanted: frozenset[str]) -> dict[str, int]:
        """The first block that uses each parameter: backwards, the last one."""
        found = dict.fromkeys(wanted, 0)
        for index in reversed(range(len(self._plan.blocks))):
            for node in self._plan.blocks[index].inputs:
                name = self._plan.program.weight_of.get(node.name)
                if name in found:
                    found[name] = index
        return found

    # --- which loss ----------------------------------------------------------------------------------------

    def _loss(self, batch: int, inputs: Mapping[fx.Node, Any], outputs: Sequence[Any]) -> Tensor:
        if self._next_token is not None:
            return self._next_token(inputs, outputs)
        generator = torch.Generator().manual_seed((self._seed + batch) % 2**63)
        total = torch.zeros((), dtype=torch.float64)
        for value in outputs:
            if _is_float(value):
                direction = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
                size = value.detach().double().norm().clamp_min(torch.finfo(torch.float32).tiny)
                total = total + (value * direction).sum(dtype=torch.float64) / size
        return total

    @cached_property
    def _next_token(self) -> _NextToken | None:
        """Found by running: earlier scores must not change with a later token."""
        walk = self._start()
        walk.inputs, walk.values = walk.inputs[:1], [{}]
        first = walk.inputs[0]
        for ids in self._token_inputs():
            tokens = first[ids]
            if tokens.dim() != 2 or tokens.shape[1] < 2:
                continue
            runs = []
            changed = tokens.clone()
            changed[:, -1] = torch.where(tokens[:, -1] == tokens[:, 0], tokens[:, 1], tokens[:, 0])
            for given in (tokens, changed):
                one = copy.copy(walk)
                one.inputs = [first | {ids: given}]
                self._finish(one, self._state)
                runs.append(one.outputs()[0])
            for place, (a, b) in enumerate(zip(*runs, strict=True)):
                scores = _is_float(a) and a.dim() == 3 and a.shape[:2] == tokens.shape
                if scores and int(tokens.max()) < a.shape[2] and _earlier_equal(a, b):
                    return _NextToken(ids, place)
        return None

    def _token_inputs(self) -> list[fx.Node]:
        """Integer inputs that look up rows of a table, the largest table first."""
        rows: dict[fx.Node, int] = {}
        for site in self._plan.sites:
            given = _given(site.input) if site.kind is SiteKind.EMBEDDING else None
            if given in self._plan.inputs.values():
                assert given is not None
                rows[given] = max(rows.get(given, 0), self._state.weights[site.name].shape[0])
        return sorted(rows, key=lambda node: -rows[node])

    # --- walking -------------------------------------------------------------------------------------------

    def _start(self, double: bool = False) -> Walk:
        walk = self._make(double)
        count = len(walk.inputs) if self._samples is None else min(self._samples, len(walk.inputs))
        chosen = [i * len(walk.inputs) // count for i in range(count)]
        walk.inputs = [walk.inputs[i] for i in chosen]
        walk.values = [{} for _ in chosen]
        return walk

    def _finish(self, walk: Walk, state: CompressionState) -> None:
        walk.values = list(walk.values)
        with torch.no_grad():
            while walk.position < len(self._plan.blocks):
                walk.advance(state)

    def _measure(self, walk: Walk, reference: Sequence[Sequence[Any]]) -> float:
        """Mean loss over batches; without next tokens, the mean relative change of the outputs."""
        found = []
        with torch.no_grad():
            for inputs, outputs, wanted in zip(walk.inputs, walk.outputs(), reference, strict=True):
                if self._next_token is not None:
                    found.append(float(self._next_token(inputs, outputs)))
                else:
                    found.append(_change(outputs, wanted))
        return sum(found) / len(found)


@dataclass(frozen=True, eq=False)
class _NextToken:
    """Cross-entropy of the token that follows.

    Args:
        ids: Input of token ids ``[B, T]``.
        place: Which flat output holds the scores ``[B, T, V]``.
    """

    ids: fx.Node
    place: int

    def __call__(self, inputs: Mapping[fx.Node, Any], outputs: Sequence[Any]) -> Tensor:
        scores, ids = outputs[self.place], inputs[self.ids]
        scores = scores if scores.element_size() >= 4 else scores.float()
        return torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _given(node: fx.Node | None) -> fx.Node | None:
    """The input that ``node`` is a view (or a cast) of; the last node on the way when there are several."""
    while node is not None and node.op != "placeholder":
        sources = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
        if len(sources) != 1:
            break
        node = sources[0]
    return node


def _earlier_equal(a: Tensor, b: Tensor) -> bool:
    """Whether all but the last scores are equal, and the last are not."""
    scale = float(a.abs().max()) or 1.0
    earlier = float((a[:, :-1] - b[:, :-1]).abs().max()) / scale
    return earlier <= (_CAUSAL if a.element_size() >= 4 else 100 * _CAUSAL)


def _change(outputs: Sequence[Any], wanted: Sequence[Any]) -> float:
    errors = []
    for a, b in zip(outputs, wanted, strict=True):
        if _is_float(a):
            size = float(b.double().norm())
            errors.append(float((a.double() - b.double()).norm()) / size if size else float(a.abs().max()))
    return sum(errors) / max(1, len(errors))


def _rows(value: Tensor) -> Tensor:
    return value.detach().reshape(-1, value.shape[-1]).float()


def _spread(ends: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    if not ends:
        return None
    each = max(1, _STREAM_TOKENS // len(ends))
    kept = []
    for before, after in ends:
        places = torch.linspace(0, before.shape[0] - 1, min(each, before.shape[0])).long()
        kept.append((before[places], after[places]))
    return torch.cat([before for before, _ in kept]), torch.cat([after for _, after in kept])


def _add(cotangents: dict[fx.Node, Tensor], node: fx.Node, gradient: Tensor) -> None:
    cotangents[node] = cotangents[node] + gradient if node in cotangents else gradient


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_floating(node: fx.Node) -> bool:
    return _is_float(node.meta.get("val"))
