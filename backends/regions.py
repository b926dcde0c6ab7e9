"""Cut a rewritten graph into blocks, compile every distinct block once, and run them in sequence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.analysis.blocks import Block, find_blocks
from fxcompress.apply import AppliedGraph
from fxcompress.backends.cpu import sparse
from fxcompress.backends.cpu.epilogues import FusedProduct
from fxcompress.backends.cpu.experts import weight_of_experts
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.planning import (
    DEQUANTIZE,
    EMBEDDINGS,
    PackedInput,
    Plan,
    make_plan,
    needed_layouts,
    weight_of_linear,
)
from fxcompress.backends.cpu.roofline import KernelUse
from fxcompress.backends.target import CpuTarget, target_of
from fxcompress.compat import fake_mode_of, trace_pre_dispatch
from fxcompress.form_inputs import TensorRef
from fxcompress.store import WeightStore

logger = logging.getLogger("fxcompress.backends")
aten = torch.ops.aten
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[[list[Any]], Any]]


@dataclass
class Region:
    """A compiled block in place.

    Args:
        function: Compiled; takes one list of the values below in order, returns the block outputs.
        values: Nodes of the outer graph whose values come first.
        packed: Then packed tensors: (input description, the terms it packs).
        outputs: Nodes of the outer graph that the results are.
    """

    function: Callable[..., Any]
    values: tuple[fx.Node, ...]
    packed: tuple[tuple[PackedInput, tuple[TensorRef, ...]], ...]
    outputs: tuple[fx.Node, ...]


@dataclass
class _Compiled:
    function: Callable[..., Any]
    kept: tuple[int, ...]  # which block inputs it takes
    packed: tuple[PackedInput, ...]
    symbols: tuple[sympy.Symbol, ...]
    specs: dict[tuple[int, ...], tuple[LinearSpec, Layout]]  # by the positions of the codes
    choices: dict[int, str]  # by the place of a linear in the block


@dataclass
class RegionCompiler:
    """Compiles the blocks of one applied graph.

    Args:
        applied: The graph.
        store: Where packed weights come from; used for the shapes of the packed inputs.
        compiler: Inner compiler, given a flat graph module and fake inputs.
    """

    applied: AppliedGraph
    store: WeightStore
    compiler: Compiler
    cache: dict[str, _Compiled] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    uses: list[KernelUse] = field(default_factory=list)
    target: CpuTarget = field(default_factory=CpuTarget)

    def compile(self) -> list[Region]:
        """Compile all blocks, each distinct structure once."""
        graph = self.applied.module.graph
        self.target = target_of(node.meta.get("val") for node in graph.nodes)
        self.target.prepare(graph)
        _drop_identities(graph)
        mode = fake_mode_of([node.meta.get("val") for node in graph.nodes])
        return [self._region(block, mode) for block in find_blocks(graph)]

    def _region(self, block: Block, mode: FakeTensorMode | None) -> Region:
        inputs = self._with_sizes(block.inputs)
        siblings = self._siblings(block)
        place = {node: index for index, node in enumerate(block.nodes)}
        # Codes that the graph brought along are none of the state: they are dequantized in the graph.
        own = {node: index for index, node in enumerate(inputs) if node.name in self.applied.form_inputs}
        groups = [[place[node] for node in group] for group in siblings]
        key = repr((block.structure, len(inputs), list(own.values()), groups))
        symbols = _symbols(inputs)
        if key not in self.cache:
            plan = make_plan(block.nodes, own, siblings, self._term, block.outputs, self.target.choose)
            self.target.extend(plan, block.nodes, own)
            self.cache[key] = self._compile(block, inputs, plan, symbols, mode)
        compiled = self.cache[key]
        self._explain(block, compiled)
        _unify(compiled.symbols, symbols, mode)
        self.uses += [
            KernelUse(spec, tuple(self._term(inputs[p]) for p in position), layout, self.target)
            for position, (spec, layout) in compiled.specs.items()
        ]
        packed = tuple(
            (item, tuple(self._term(inputs[position]) for position in item.positions))
            for item in compiled.packed
        )
        values = tuple(inputs[index] for index in compiled.kept)
        return Region(compiled.function, values, packed, block.outputs)

    def _explain(self, block: Block, compiled: _Compiled) -> None:
        """Note the kernel of every weight of the block, whether compiled here or for an equal one."""
        for index, text in compiled.choices.items():
            node = block.nodes[index]
            weight = weight_of_linear(node) or weight_of_experts(node, DEQUANTIZE)
            if weight is not None:
                self.choices[str(self._term(weight.args[0]))] = text
        for node in block.inputs:
            ref = self.applied.form_inputs.get(node.name)
            if ref is not None and ref.path.endswith((".u.values", ".v.values")):
                self.choices[str(ref.owner)] = "dense factor: ATen"
        for node in block.nodes:
            product = sparse.weight_of(node)
            if product is not None and product in self.applied.dequantized:
                self.choices[self.applied.dequantized[product]] = sparse.describe(node)
        for node in block.nodes:
            name = self.applied.dequantized.get(node)
            if (
                name is not None
                and node.target not in (*DEQUANTIZE, *EMBEDDINGS)
                and name not in self.choices
            ):
                described = self.target.describe(node)
                if described is not None:
                    self.choices[name] = described
                    continue
                self.choices[name] = f"no kernel for {node.target}: dequantized at run time"
                logger.info("%s: %s", name, self.choices[name])

    def _siblings(self, block: Block) -> list[list[fx.Node]]:
        """Groups of linears of this block that the state fuses and that read the same activation."""
        at: dict[TensorRef, fx.Node] = {}
        for node in block.nodes:
            weight = weight_of_linear(node)
            source = weight.args[0] if weight is not None else None
            if isinstance(source, fx.Node) and source.name in self.applied.form_inputs:
                at.setdefault(self._term(source), node)
        groups = []
        for names in self.store.state.fused:
            for path in [ref.path for ref in at if ref.name == names[0]]:
                nodes = [at[ref] for name in names if (ref := TensorRef(name, path)) in at]
                if len(nodes) == len(names) > 1 and len({node.args[0] for node in nodes}) == 1:
                    groups.append(sorted(nodes, key=block.nodes.index))
        return groups

    def _compile(
        self,
        block: Block,
        inputs: Sequence[fx.Node],
        plan: Plan,
        symbols: tuple[sympy.Symbol, ...],
        mode: FakeTensorMode | None,
    ) -> _Compiled:
        module, node_map = extract(self.applied.module, block, inputs)
        local = translate(plan, node_map)
        packed: dict[PackedInput, Tensor] = {}
        for layout, positions in needed_layouts(plan):
            terms = [self._term(inputs[position]) for position in positions]
            for tensor, value in self.store.packed(layout, terms).items():
                packed[PackedInput(layout, positions, tensor)] = value
        keys = tuple(packed)
        fakes = [node.meta.get("val") for node in inputs]
        where = self.store.device
        fakes = [_fake(value, mode, where) for value in fakes]
        fakes += [_fake(packed[key], mode, where) for key in keys]

        def run(*arguments: Any) -> Any:
            given = dict(zip(keys, arguments[len(inputs) :], strict=True))
            return self.target.interpreter(module, local, given).run(*arguments[: len(inputs)])

        with torch.no_grad():
            lowered = trace_pre_dispatch(run, fakes, mode)
            scalars = {index for index, value in enumerate(fakes) if isinstance(value, torch.SymInt)}
            kept, used = _drop_unused_inputs(lowered, len(inputs), scalars)
            function = self.compiler(lowered, [fakes[index] for index in kept + used])
        specs = {
            tuple(plan.codes[member] for member in group): (plan.specs[first], plan.layouts[first])
            for first, group in plan.groups.items()
        }
        taken = tuple(keys[index - len(inputs)] for index in used)
        choices = {block.nodes.index(node): text for node, text in plan.choices.items()}
        return _Compiled(function, tuple(kept), taken, symbols, specs, choices)

    def _term(self, codes: Any) -> TensorRef:
        """The quantized term whose codes a graph input takes."""
        return self.applied.form_inputs[codes.name].owner

    def _with_sizes(self, inputs: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Add a scalar input for every symbol that no input shows as a plain size."""
        missing = [symbol for symbol in _symbols(inputs) if symbol not in _plain_symbols(inputs)]
        found = tuple(self._scalar(symbol) for symbol in missing)
        return inputs + tuple(node for node in found if node is not None)

    def _scalar(self, symbol: sympy.Symbol) -> fx.Node | None:
        for node in self.applied.module.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                return node  # type: ignore[no-any-return]
        return None


_CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other)


def _drop_identities(graph: fx.Graph) -> None:
    """Read the input of conversions that convert nothing.

    They give back their input itself; as a block's output it would make AOTAutograd wrap the block in Python.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _CONVERSIONS:
            continue
        source = node.args[0]
        before = source.meta.get("val") if isinstance(source, fx.Node) else None
        after = node.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            continue
        copies = node.kwargs.get("copy") or any(item is True for item in node.args[1:])
        formatted = node.kwargs.get("memory_format") or any(
            isinstance(item, torch.memory_format) for item in node.args[1:]
        )
        same = (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
        if same and not copies and not formatted:
            node.replace_all_uses_with(cast("fx.Node", source))
            graph.erase_node(node)


def extract(
    module: fx.GraphModule, block: Block, inputs: Sequence[fx.Node]
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A module computing ``block.outputs`` from ``inputs``; also the map from outer to inner nodes."""
    graph = fx.Graph()
    node_map: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        node_map[node] = graph.placeholder(f"in_{index}")
        node_map[node].meta = dict(node.meta)
    for node in block.nodes:
        node_map[node] = graph.node_copy(node, lambda source: node_map[source])
    graph.output(tuple(node_map[node] for node in block.outputs))
    return fx.GraphModule(module, graph), node_map


def translate(plan: Plan, node_map: Mapping[fx.Node, fx.Node]) -> Plan:
    """The same plan in terms of the extracted module's nodes."""
    return Plan(
        kernels={node_map[node]: kernel for node, kernel in plan.kernels.items()},
        members={node_map[node]: (node_map[first], index) for node, (first, index) in plan.members.items()},
        groups={node_map[node]: tuple(node_map[m] for m in group) for node, group in plan.groups.items()},
        codes={node_map[node]: position for node, position in plan.codes.items()},
        specs={node_map[node]: spec for node, spec in plan.specs.items()},
        embeddings={node_map[node]: position for node, position in plan.embeddings.items()},
        experts={node_map[node]: experts for node, experts in plan.experts.items()},
        fused={
            node_map[node]: FusedProduct(
                node_map[product.first],
                product.epilogue,
                None if product.residual is None else node_map[product.residual],
            )
            for node, product in plan.fused.items()
        },
        layouts={node_map[node]: layout for node, layout in plan.layouts.items()},
        absorbed={node_map[node] for node in plan.absorbed},
        singles={node_map[node]: single for node, single in plan.singles.items()},
    )


def _drop_unused_inputs(
    module: fx.GraphModule, n_values: int, scalars: set[int]
) -> tuple[list[int], list[int]]:
    """Remove unread placeholders; returns the indices kept below and from ``n_values`` on.

    Symbolic ``scalars`` stay: generated code may need their values for sizes that no tensor shows. So do
    tensors that nothing but their sizes is read of, if no other input shows these.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    read = {node: bool(node.users) or index in scalars for index, node in enumerate(placeholders)}
    missing = set(_symbols(list(module.graph.nodes))) - _plain_symbols([n for n in placeholders if read[n]])
    kept = []
    for index, node in enumerate(placeholders):
        shown = missing & _plain_symbols([node])
        if read[node] or shown:
            kept.append(index)
            missing -= shown
        else:
            module.graph.erase_node(node)
    module.recompile()
    return [index for index in kept if index < n_values], [index for index in kept if index >= n_values]


def _fake(value: Any, mode: FakeTensorMode | None, device: torch.device) -> Any:
    """A graph input as the compiler sees it; tensors of forms, known by shape only, lie on ``device``."""
    if isinstance(value, torch.SymInt) and value.node._expr != value.node.expr:
        # Found equal to another size since: Inductor would call the input by one symbol, its uses by another.
        return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)
    if not isinstance(value, Tensor) or mode is None:
        return value
    if isinstance(value, torch._subclasses.fake_tensor.FakeTensor) and value.fake_mode is mode:
        return value
    if value.device.type == "meta":
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return mode.from_tensor(value, static_shapes=True)


def _expressions(node: fx.Node, *, strides: bool = True) -> list[sympy.Expr]:
    value = node.meta.get("val")
    sizes: list[Any] = []
    for leaf in value if isinstance(value, list | tuple) else [value]:
        if isinstance(leaf, Tensor):
            sizes += [*leaf.shape, *(leaf.stride() if strides else ())]
        else:
            sizes.append(leaf)
    return [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]


def _symbols(nodes: Sequence[fx.Node]) -> tuple[sympy.Symbol, ...]:
    """Free symbols of the nodes' types, in order of appearance."""
    found: dict[sympy.Symbol, None] = {}
    for node in nodes:
        for expression in _expressions(node):
            for symbol in sorted(expression.free_symbols, key=str):
                found.setdefault(symbol)
    return tuple(found)


def _plain_symbols(nodes: Sequence[fx.Node]) -> set[sympy.Symbol]:
    return {
        expression
        for node in nodes
        for expression in _expressions(node, strides=False)
        if isinstance(expression, sympy.Symbol)
    }


def _unify(
    compiled: Sequence[sympy.Symbol], here: Sequence[sympy.Symbol], mode: FakeTensorMode | None
) -> None:
    """A reused block assumes what the compiled one assumed: guard that corresponding sizes are equal."""
    if mode is None or mode.shape_env is None:
        return
    for one, two in zip(compiled, here, strict=True):
        if one != two:
            mode.shape_env.evaluate_expr(sympy.Eq(one, two))
