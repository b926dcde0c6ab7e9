"""Run a program block by block, with the edits made so far, holding one block's values at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.analysis.op_arguments import replace_argument
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.calibration.plan import Plan
from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError
from fxcompress.forms import ActivationQuantizer, SiteForm
from fxcompress.ops.activation import apply_quantizer, apply_transforms
from fxcompress.ops.straight_through import straight_through

__all__ = ["BlockRunner", "Plan", "Values", "Walk"]

Values = dict[fx.Node, Any]


class BlockRunner:
    """Interprets one block with the forms of a :class:`CompressionState`.

    Parameters take their effective value, computed once per runner; sites with input transforms or an
    activation quantizer see what the compressed model would see.

    Args:
        plan: The program's plan.
        index: Which block.
        state: Edits to compute with. Read at each run; call :meth:`forget` for names edited since.
        double: Compute everything in float64: weights, inputs and every dtype the graph itself asks for.
        tensors: Values to use for some parameters. When given, gradients flow where the caller enables them
            (straight through quantizers); else none are recorded.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        state: CompressionState,
        *,
        double: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.plan = plan
        self.block = plan.blocks[index]
        self.state = state
        self.double = double
        self._tensors = tensors
        self._weights: dict[fx.Node, Any] = {}
        self._schedules: dict[tuple[fx.Node, ...], tuple[list[fx.Node], list[list[fx.Node]]]] = {}
        self._mutating = [node for node in self.block.nodes if _mutates(node)]

    def forget(self, names: Sequence[str]) -> None:
        """Drop cached values of parameters whose form changed."""
        program = self.plan.program
        for node in [n for n in self._weights if program.weight_of.get(n.name) in names]:
            del self._weights[node]

    def run(self, values: Mapping[fx.Node, Any], wanted: Sequence[fx.Node]) -> Values:
        """Values of ``wanted`` for one batch, running only what they need.

        Args:
            values: User inputs and values of earlier blocks.
            wanted: Nodes of this block, or values it is given.
        """
        with torch.set_grad_enabled(self._tensors is not None and torch.is_grad_enabled()):
            return self._run(values, wanted)

    def _run(self, values: Mapping[fx.Node, Any], wanted: Sequence[fx.Node]) -> Values:
        schedule, last_use = self._schedule(tuple(dict.fromkeys(wanted)))
        keep = set(wanted)
        env: Values = dict(values) if not self._mutating else _clone_values(values)
        for step, node in enumerate(schedule):
            env[node] = self._execute(node, env)
            for dead in last_use[step]:
                if dead not in keep:
                    env.pop(dead, None)
        return {node: self._read(node, env) for node in wanted}

    def inputs_needed(self, sites: Sequence[Site]) -> list[fx.Node]:
        """Everything :meth:`evaluate_site` reads for these sites, parameters aside."""
        found: dict[fx.Node, None] = {}
        for site in sites:
            inside = {*site.chain, site.node}
            for node in (*site.chain, site.node):
                for source in node.all_input_nodes:
                    if source not in inside and source.name not in self.plan.program.weight_of:
                        found.setdefault(source)
        return list(found)

    @torch.no_grad()
    def evaluate_site(self, site: Site, env: Mapping[fx.Node, Any]) -> Any:
        """The output of one site on given inputs, with the runner's state."""
        local: Values = dict(env)
        for node in site.chain:
            local[node] = self._execute(node, local)
        return self._execute(site.node, local)

    def _schedule(self, wanted: tuple[fx.Node, ...]) -> tuple[list[fx.Node], list[list[fx.Node]]]:
        """The nodes to run, and after each the values nobody reads any more."""
        if wanted not in self._schedules:
            self._schedules[wanted] = self._make_schedule(wanted)
        return self._schedules[wanted]

    def _make_schedule(self, wanted: tuple[fx.Node, ...]) -> tuple[list[fx.Node], list[list[fx.Node]]]:
        members = set(self.block.nodes)
        needed: set[fx.Node] = set()
        stack = [node for node in wanted if node in members]
        if self._mutating and stack:
            stack += self._mutating  # their effect on other values is invisible in the edges
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack += [source for source in node.all_input_nodes if source in members]
        schedule = [node for node in self.block.nodes if node in needed]
        last: dict[fx.Node, int] = {}
        for step, node in enumerate(schedule):
            last[node] = step
            for source in node.all_input_nodes:
                last[source] = step
        last_use: list[list[fx.Node]] = [[] for _ in schedule]
        if not self._mutating:
            for node, step in last.items():
                last_use[step].append(node)
        return schedule, last_use

    def _read(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if node in env:
            return env[node]
        if node not in self._weights:
            self._weights[node] = self._load(node)
        return self._weights[node]

    def _load(self, node: fx.Node) -> Any:
        program = self.plan.program
        if node.op == "get_attr":
            value: Any = program.graph_module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return (
                _double_module(value)
                if self.double and isinstance(value, fx.GraphModule)
                else self._cast(value)
            )
        name = program.weight_of.get(node.name)
        if name is None:
            raise CalibrationError(f"{self.block.name}: the value {node.name!r} was not given.")
        if self._tensors is not None and name in self._tensors:
            return self._tensors[name]
        value = self.state.effective(name) if name in self.state.weights else program.weights[name]
        if self._tensors is not None and isinstance(value, Tensor):
            value = value.detach()
        if self._mutating and name not in program.parameters:
            value = value.clone()
        return self._cast(value)

    def _cast(self, value: Any) -> Any:
        return pytree.tree_map_only(Tensor, _to_double, value) if self.double else value

    def _execute(self, node: fx.Node, env: Values) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._read(source, env))
        if self.double:
            args, kwargs = pytree.tree_map(_double_dtype, (args, kwargs))
        for site in self.plan.sites_at.get(node, ()):
            form = self.state.forms.get(site.name)
            if form is not None and site.takes_activation and _changes_io(form):
                return self._cast(self._compressed_site(site, form, env, kwargs))
            if form is not None and site.kind is SiteKind.EMBEDDING and form.transform_in:
                rows = self._call(node, args, kwargs)
                return self._cast(apply_transforms(rows, form.transform_in))
        args, kwargs = self._quantized_edges(node, args, kwargs)
        closed = self.state.closed.get(node.name)
        if closed is not None:
            route, gone = closed
            close = functools.partial(_closed, dim=route.dim, gone=gone)
            args, kwargs = replace_argument(node, args, kwargs, route.argument, close)
        return self._cast(self._call(node, args, kwargs))

    def _quantized_edges(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for edge in self.plan.edges_at.get(node, ()) if self._has_edges else ():
            for held in self.state.form(edge.anchor).edges:
                if held.signature == edge.signature:
                    apply = functools.partial(self._quantized, quantizer=held.quantizer)
                    args, kwargs = replace_argument(node, args, kwargs, edge.argument, apply)
        return args, kwargs

    @property
    def _has_edges(self) -> bool:
        return any(form.edges for form in self.state.forms.values())

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        target = str(node.target)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.plan.program.graph_module.get_submodule(target)(*args, **kwargs)
        raise CalibrationError(f"{self.block.name}: cannot run the node {node.name!r} ({node.op}).")

    def _compressed_site(self, site: Site, form: SiteForm, env: Values, kwargs: Any) -> Any:
        """``T_out(W Q(T_in(x))) + bias``; the bias stays outside ``T_out``."""
        node = site.node
        new: Values = {}
        if site.input is not None and (form.transform_in or form.activation is not None):
            x = apply_transforms(self._read(site.input, env), form.transform_in)
            new[site.input] = x if form.activation is None else self._quantized(x, form.activation)
        bias = self._read(site.bias_node, env) if site.bias_node is not None else None
        if form.bias is not None:
            bias = self._cast(
                form.bias.to(_dtype_of(node, form.bias.dtype)) if not self.double else form.bias
            )
        outside = bool(form.transform_out) or (form.bias is not None and site.bias_node is None)
        if site.bias_node is not None:
            new[site.bias_node] = torch.zeros_like(bias) if outside and bias is not None else bias
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda source: new[source] if source in new else self._read(source, env)
        )
        if self.double:
            args, kwargs = pytree.tree_map(_double_dtype, (args, kwargs))
        out = self._call(node, args, kwargs)
        if not outside:
            return out
        out = apply_transforms(out, form.transform_out)
        if bias is None:
            return out
        if site.kind in (SiteKind.CONV, SiteKind.CONV_TRANSPOSED):
            bias = bias.reshape(-1, *([1] * (len(site.layout.shape) - 2)))
        return out + bias

    def _quantized(self, x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
        if not torch.is_grad_enabled():
            return apply_quantizer(x, quantizer)
        return straight_through(x, apply_quantizer(x.detach(), quantizer))


class Walk:
    """The state of a walk: for every batch, the values that are alive between two blocks.

    Args:
        plan: The program's plan.
        batches: Flat user inputs per batch, in the order of ``program.inputs``.
        double: Compute in float64.
    """

    def __init__(self, plan: Plan, batches: Sequence[Sequence[Any]], *, double: bool = False) -> None:
        self.plan = plan
        self.double = double
        self.position = 0
        self.inputs: list[Values] = []
        for batch in batches:
            nodes = [plan.inputs[name] for name in plan.program.inputs]
            values = {node: _on_device(value, node) for node, value in zip(nodes, batch, strict=True)}
            self.inputs.append(pytree.tree_map_only(Tensor, _to_double, values) if double else values)
        self.values: list[Values] = [{} for _ in batches]

    def runner(self, state: CompressionState) -> BlockRunner:
        """A runner of the block at the current position."""
        return BlockRunner(self.plan, self.position, state, double=self.double)

    def collect(self, runner: BlockRunner, wanted: Sequence[fx.Node]) -> Iterator[Values]:
        """Values of ``wanted`` nodes of the current block, batch by batch; the walk stays where it is."""
        for index in range(len(self.inputs)):
            yield self._run(runner, index, wanted)

    def value(self, runner: BlockRunner, index: int, wanted: Sequence[fx.Node]) -> Values:
        """Values of ``wanted`` nodes of the current block for batch ``index``."""
        return self._run(runner, index, wanted)

    def advance(self, state: CompressionState) -> None:
        """Run the current block on all batches (or step over it, if it is removed) and go to the next one."""
        runner = self.runner(state)
        keep = self.plan.keep[self.position]
        computed = [node for node in runner.block.nodes if node in keep]
        bypass = self.plan.bypass(self.position, state.removed)
        for index, old in enumerate(self.values):
            if bypass is None:
                new = self._run(runner, index, computed)
            else:
                new = {node: (self.inputs[index] | old)[bypass[node]] for node in computed}
            self.values[index] = {node: value for node, value in old.items() if node in keep} | new
        self.position += 1

    def outputs(self) -> list[list[Any]]:
        """The graph's flat outputs per batch, once every block has run."""
        if self.position != len(self.plan.blocks):
            raise CalibrationError("walk: the outputs were asked for before the last block ran.")
        program = self.plan.program
        out = []
        for inputs, values in zip(self.inputs, self.values, strict=True):
            env = inputs | values

            def read(node: fx.Node, env: Values = env) -> Any:
                return env[node] if node in env else program.weights[program.weight_of[node.name]]

            result = fx.node.map_arg(self.plan.output.args[0], read)
            out.append(list(result) if isinstance(result, tuple | list) else [result])
        return out

    def _run(self, runner: BlockRunner, index: int, wanted: Sequence[fx.Node]) -> Values:
        try:
            return runner.run(self.inputs[index] | self.values[index], wanted)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise CalibrationError(
                f"{runner.block.name}: batch {index + 1} of {len(self.inputs)} cannot run: {lines[0]}",
                fix="give batches of the shapes and dtypes that the model was captured with.",
            ) from error


def _closed(scores: Tensor, dim: int, gone: Tensor) -> Tensor:
    """Scores with minus infinity for units that are masked."""
    return scores.index_fill(dim, gone.to(scores.device), float("-inf"))


def _changes_io(form: SiteForm) -> bool:
    return bool(
        form.transform_in or form.transform_out or form.activation is not None or form.bias is not None
    )


def _dtype_of(node: fx.Node, default: torch.dtype) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else default


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _clone_values(values: Mapping[fx.Node, Any]) -> Values:
    """Copy every storage once, so that in-place ops of the graph cannot reach what the walk keeps.

    Tensors that gradients are asked for are copied by themselves, which keeps the gradients.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(value: Tensor) -> Tensor:
        if value.requires_grad and torch.is_grad_enabled():
            return value.clone()
        old = value.untyped_storage()
        if old.data_ptr() not in storages:
            storages[old.data_ptr()] = old.clone()
        out = torch.empty(0, dtype=value.dtype, device=value.device)
        return out.set_(storages[old.data_ptr()], value.storage_offset(), value.shape, value.stride())

    copied: Values = pytree.tree_map_only(Tensor, copy, dict(values))
    return copied


def _on_device(value: Any, node: fx.Node) -> Any:
    example = node.meta.get("val")
    return value.to(example.device) if isinstance(value, Tensor) and isinstance(example, Tensor) else value


def _to_double(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.to(torch.float64)
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor


def _double_dtype(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        if value.is_floating_point:
            return torch.float64
        return torch.complex128 if value.is_complex else value
    return value


def _double_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a sub-graph (of a higher-order op) in which every floating dtype is float64."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    for node in graph.nodes:
        node.args, node.kwargs = pytree.tree_map(_double_dtype, (node.args, node.kwargs))
    copied = fx.GraphModule(module, graph)
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, _double_module(child))
    return copied
