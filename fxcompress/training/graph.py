"""The training graph: the compressed model's own graph as a module, block by block, with trained inputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fxcompress.analysis.attention import AttentionSite, find_attention
from fxcompress.analysis.blocks import Block, make_block
from fxcompress.analysis.bypass import find_bypass
from fxcompress.apply import AppliedGraph, apply_state
from fxcompress.calibration.plan import Plan
from fxcompress.calibration.signature import CallSignature
from fxcompress.edits import CompressionState
from fxcompress.errors import TrainingError
from fxcompress.form_inputs import TensorRef, form_tensor
from fxcompress.training.forms import round_as_cached
from fxcompress.training.trainable import Trainable, What
from fxcompress.training.values import TrainedValue

__all__ = ["Outputs", "TrainingGraph"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one call gives.

    Args:
        scores: The main output: ``[B, T, V]`` scores of tokens, or any floating tensor.
        hidden: The residual stream behind every repeated block ``[B, T, D]``, where it was asked for.
        attention: Per attention ``(query [B, H, T, D], key [B, H, S, D])``, where asked for.
    """

    scores: Tensor
    hidden: tuple[Tensor, ...] = ()
    attention: tuple[tuple[Tensor, Tensor], ...] = ()


class _Segment(nn.Module):
    """One block of the graph, run node by node; trained values that only it reads are its own.

    Args:
        block: The nodes.
        module: The graph's module, for attributes.
    """

    def __init__(self, block: Block, module: fx.GraphModule) -> None:
        super().__init__()
        self.block = block
        self._graph_module = (module,)  # in a tuple: its parts are no submodules of this one
        self.own: dict[fx.Node, str] = {}
        self._mutates = any(_is_mutable(node) for node in block.nodes)

    def adopt(self, node: fx.Node, value: TrainedValue) -> None:
        """Compute the value of a placeholder in here."""
        name = f"value_{len(self.own)}"
        self.own[node] = name
        setattr(self, name, value)

    def forward(self, *given: Any) -> tuple[Any, ...]:
        """Values of the block's outputs; ``given`` are those of its inputs, None for its own."""
        env = dict(zip(self.block.inputs, given, strict=True))
        for node, name in self.own.items():
            env[node] = getattr(self, name)()
        if self._mutates:  # the graph writes in place; what it was given may be needed again
            env = {n: v.clone() if isinstance(v, Tensor) else v for n, v in env.items()}
        remaining = self._uses()
        for node in self.block.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = self._call(node, args, kwargs)
            for source in node.all_input_nodes:
                remaining[source] -= 1
                if not remaining[source]:
                    del env[source]
        return tuple(env[node] for node in self.block.outputs)

    def _uses(self) -> dict[fx.Node, int]:
        counts = dict.fromkeys(self.block.outputs, 1)
        for node in self.block.nodes:
            for source in node.all_input_nodes:
                counts[source] = counts.get(source, 0) + 1
        return counts

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self._graph_module[0].get_submodule(str(node.target))(*args, **kwargs)
        raise TrainingError(f"{self.block.name}: cannot run the node {node.name!r} ({node.op}).")


class TrainingGraph(nn.Module):
    """A model as captured and compressed, whose parameters are what is trained.

    Frozen tensors are shared with the model (buffers that are not saved); packed weights stay packed and are
    dequantized where they are used. Nothing but trained parameters requires gradients.

    Args:
        plan: Of the captured program.
        state: Edits so far.
        what: What to train; None trains nothing (a teacher).
        originals: Dense values of compressed parameters that the state does not know: where latent weights
            lean from the codes.
        checkpointing: Keep only what lies between blocks for the backward pass and run each block again.

    Raises:
        TrainingError: ``what`` takes nothing of this model.
    """

    def __init__(
        self,
        plan: Plan,
        state: CompressionState,
        what: What | None,
        *,
        originals: Mapping[str, Tensor] | None = None,
        checkpointing: bool = True,
    ) -> None:
        super().__init__()
        self.plan, self.program, self.checkpointing = plan, plan.program, checkpointing
        nothing = What(parts=())
        self.trainable = Trainable(plan.program, state, what or nothing, plan.sites, originals or {})
        applied = apply_state(plan.program, self.trainable.training, plan.sites)
        self.attention_sites = find_attention(plan.program, plan.sites)
        _round_caches(applied, state, self.attention_sites)
        self._applied = (applied,)
        self.signature = CallSignature(plan.program)
        blocks = _segments(plan, applied)
        self.segments = nn.ModuleList(_Segment(block, applied.module) for block in blocks)
        self._bind(applied)
        if what is not None and not any(True for _ in self.parameters()):
            raise TrainingError(
                f"nothing to train: no {' or '.join(what.parts) or 'parts'} of the model may be chosen.",
                fix="train other parts, or widen include/exclude.",
            )

    # --- binding -------------------------------------------------------------------------------------------

    def _bind(self, applied: AppliedGraph) -> None:
        """Give every placeholder its source: an input, a frozen tensor or a trained value."""
        self._frozen: dict[fx.Node, str] = {}
        self._shared: dict[fx.Node, str] = {}
        self._inputs: dict[fx.Node, str] = {}
        readers: dict[fx.Node, list[_Segment]] = {}
        segments: list[_Segment] = list(self.segments)  # type: ignore[arg-type]
        for segment in segments:
            for node in segment.block.inputs:
                readers.setdefault(node, []).append(segment)
        used_tensors: set[TensorRef] = set()
        used_weights: set[str] = set()
        for node in applied.module.graph.nodes:
            if node.op != "placeholder":
                continue
            name, ref = self.program.weight_of.get(node.name), applied.form_inputs.get(node.name)
            value: TrainedValue | None = None
            if name is not None:
                value = self.trainable.weights.get(name)
                used_weights.add(name)
            elif ref is not None:
                value = self.trainable.tensors.get(ref)
                used_tensors.add(ref)
            if value is not None:
                holders = readers.get(node, [])
                if len(holders) == 1:
                    holders[0].adopt(node, value)
                else:
                    self._shared[node] = f"shared_{len(self._shared)}"
                    setattr(self, self._shared[node], value)
            elif name is not None or ref is not None:
                self._freeze(node, name, ref)
            else:
                self._inputs[node] = node.name
        tensors, weights = self.trainable.tensors, self.trainable.weights
        self.trainable.tensors = {ref: value for ref, value in tensors.items() if ref in used_tensors}
        self.trainable.weights = {name: value for name, value in weights.items() if name in used_weights}

    def _freeze(self, node: fx.Node, name: str | None, ref: TensorRef | None) -> None:
        state = self.trainable.training
        if ref is not None:
            tensor = form_tensor(state, ref)
        else:
            assert name is not None
            tensor = state.weight(name) if name in state.weights else self.program.weights[name]
        self._frozen[node] = f"frozen_{len(self._frozen)}"
        self.register_buffer(self._frozen[node], tensor.detach(), persistent=False)

    # --- running -------------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Any], hidden: bool = False, attention: bool = False) -> Outputs:
        """Run the model.

        Args:
            inputs: Values of the captured inputs by placeholder name; constants may be left out.
            hidden: Also return the residual stream behind every block.
            attention: Also return queries and keys of every attention.
        """
        taps = [*(self._hidden if hidden else ()), *(n for pair in self._pairs for n in pair if attention)]
        env = self._environment(inputs)
        kept: dict[fx.Node, Any] = {}
        for segment in self.segments:
            assert isinstance(segment, _Segment)
            block = segment.block
            given = [None if node in segment.own else self._read(node, env) for node in block.inputs]
            if self.checkpointing and torch.is_grad_enabled():
                found = checkpoint(segment, *given, use_reentrant=False)
            else:
                found = segment(*given)
            env.update(zip(block.outputs, found, strict=True))
        kept = {node: env[node] for node in taps}
        return Outputs(
            self._main(env),
            tuple(kept[node] for node in (self._hidden if hidden else ())),
            tuple(self._pair(site, kept) for site in self.attention_sites) if attention else (),
        )

    def _environment(self, inputs: Mapping[str, Any]) -> dict[fx.Node, Any]:
        env: dict[fx.Node, Any] = {}
        for node, name in self._inputs.items():
            env[node] = inputs[name] if name in inputs else self.signature.nodes[name].meta.get("val")
        for node, name in self._frozen.items():
            env[node] = getattr(self, name)
        for node, name in self._shared.items():
            env[node] = getattr(self, name)()
        return env

    def _read(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node in env or node.op != "get_attr":
            return env[node]
        value: Any = self._applied[0].module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def _main(self, env: Mapping[fx.Node, Any]) -> Tensor:
        output = next(node for node in self._applied[0].module.graph.nodes if node.op == "output")
        flat = output.args[0]
        nodes = flat if isinstance(flat, list | tuple) else [flat]
        values = [env[node] for node in nodes if isinstance(node, fx.Node) and node in env]
        floating = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        if not floating:
            raise TrainingError("the model has no floating-point output to learn.")
        rows = {found.rows for found in self.signature.vocabularies.values()}
        scored = [value for value in floating if value.dim() == 3 and value.shape[-1] in rows]
        main: Tensor = (scored or floating)[0]
        return main

    @property
    def _nodes(self) -> dict[fx.Node, fx.Node]:
        return self._applied[0].node_of

    @property
    def _hidden(self) -> list[fx.Node]:
        found = []
        for block in self.plan.blocks:
            bypass = find_bypass(self.program, self.plan.blocks, block.index)
            if not isinstance(bypass, str):
                found += [self._nodes[n] for n in bypass.values if _is_floating(n)]
        return found

    @property
    def _pairs(self) -> list[tuple[fx.Node, fx.Node]]:
        return [(self._nodes[site.query], self._nodes[site.key]) for site in self.attention_sites]

    def _pair(self, site: AttentionSite, values: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor]:
        query, key = values[self._nodes[site.query]], values[self._nodes[site.key]]
        key = key.transpose(-1, -2) if site.key_transposed else key
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return query, key

    def tap(self) -> None:
        """Let blocks hand out what :meth:`forward` may be asked for besides the scores."""
        wanted = {*self._hidden, *(node for pair in self._pairs for node in pair)}
        for segment in self.segments:
            assert isinstance(segment, _Segment)
            block = segment.block
            mine = [n for n in block.nodes if n in wanted and n not in block.outputs]
            if mine:
                outputs = (*block.outputs, *mine)
                segment.block = Block(
                    block.index, block.name, block.nodes, block.inputs, outputs, block.structure
                )


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _segments(plan: Plan, applied: AppliedGraph) -> list[Block]:
    """The plan's blocks in the rewritten graph; what was inserted goes with the node that follows it."""
    nodes = [n for n in applied.module.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    place = {node: index for index, node in enumerate(nodes)}
    ends = [0]
    for block in plan.blocks:
        mapped = [place[applied.node_of[n]] for n in block.nodes if applied.node_of.get(n) in place]
        ends.append(max([ends[-1], *(index + 1 for index in mapped)]))
    ends[-1] = len(nodes)
    parts = [
        (block.name, nodes[a:b])
        for block, (a, b) in zip(plan.blocks, itertools.pairwise(ends), strict=True)
        if b > a
    ]
    return [make_block(index, name, part) for index, (name, part) in enumerate(parts)]


def _round_caches(applied: AppliedGraph, state: CompressionState, sites: Sequence[AttentionSite]) -> None:
    """Let attentions with a quantized cache read keys and values as the cache gives them back."""
    graph = applied.module.graph
    for site in sites:
        form = state.form(site.name).cache
        if form is None or form.exact:
            continue
        node = applied.node_of[site.node]
        scores = applied.node_of[_scores_of(site)]
        for reader, value, store, transposed in (
            (scores, site.key, form.key, site.key_transposed),
            (node, site.value, form.value, False),
        ):
            source = applied.node_of[value]
            with graph.inserting_after(source):
                rounded = graph.call_function(round_as_cached(store, form.heads, transposed), (source,))
            rounded.meta = dict(source.meta)
            reader.replace_input_with(source, rounded)


def _scores_of(site: AttentionSite) -> fx.Node:
    """The op that multiplies queries with keys: the attention itself, or the product before its softmax."""
    for user in site.key.users:
        if user is site.node or (site.query in user.all_input_nodes):
            return user
    return site.node
