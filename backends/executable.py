"""What Dynamo calls: bind packed weights to the parameters actually passed, then run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.apply import AppliedGraph
from fxcompress.backends.regions import Region
from fxcompress.capture.program import Program
from fxcompress.errors import BindingError
from fxcompress.form_inputs import TensorRef
from fxcompress.store import WeightStore

# Given the real weights of a call by canonical name, the store that holds their packed form.
Rebind = Callable[[dict[str, Tensor]], WeightStore]


@dataclass
class _Binding:
    """Packed tensors for one set of parameters."""

    owners: list[weakref.ref[Tensor]]
    versions: list[int]
    constants: list[tuple[int, Tensor]]  # slot → packed or form tensor


class Executable:
    """A compiled graph, called with Dynamo's flat inputs.

    Parameters are checked by identity (and, where weights were packed from live parameters, by version) on
    every call: a second instance of the class, a reassigned or reloaded parameter is bound to its own packed
    weights, never to somebody else's.

    Args:
        applied: The rewritten graph (its placeholders and output define the calling convention).
        store: Packed weights for the parameters seen while compiling.
        rebind: Called when other parameters arrive.
        regions: Compiled blocks; None runs the rewritten graph itself (reference).
    """

    def __init__(
        self, applied: AppliedGraph, store: WeightStore, rebind: Rebind, regions: Sequence[Region] | None
    ) -> None:
        program = applied.program
        self._program = program
        self._module = applied.module
        self._rebind = rebind
        self._placeholders = [node.name for node in program.placeholders()]
        self._compressed = [
            index
            for index, name in enumerate(self._placeholders)
            if name in program.weight_of and store.state.is_compressed(program.weight_of[name])
        ]
        slots: dict[fx.Node, int] = {}
        self._arguments: list[tuple[int, int]] = []  # (argument index, slot)
        self._forms: list[tuple[TensorRef, int]] = []
        order = {name: index for index, name in enumerate(self._placeholders)}
        for node in applied.module.graph.nodes:
            if node.op == "placeholder":
                slot = slots.setdefault(node, len(slots))
                if node.name in applied.form_inputs:
                    self._forms.append((applied.form_inputs[node.name], slot))
                else:
                    self._arguments.append((order[node.name], slot))
        self._types: dict[int, tuple[torch.Size, torch.dtype]] | None = None  # of the constants, by slot
        self._plan(slots, regions)
        self._bindings = [self._bind(self._weights(program), store, [])]

    def _plan(self, slots: dict[fx.Node, int], regions: Sequence[Region] | None) -> None:
        self._steps: list[tuple[Callable[..., Any], list[int], list[int]]] = []
        self._packed: list[tuple[Any, tuple[TensorRef, ...], str, int]] = []
        packed_slots: dict[tuple[str, tuple[TensorRef, ...], str], int] = {}
        self._attributes: list[tuple[int, Any]] = []
        # Slot or constant of every output; None when the only step returns the outputs itself.
        self._outputs: list[Any] | None = None
        n_slots = len(slots)
        if regions is None:
            inputs = [slots[node] for node in self._module.graph.nodes if node.op == "placeholder"]
            forward = self._module.forward
            self._steps.append((lambda values: forward(*values), inputs, [-1]))
            self._n_slots = n_slots
            return
        used_forms = {node for region in regions for node in region.values}
        self._forms = [
            (ref, slot) for ref, slot in self._forms if any(slots.get(n) == slot for n in used_forms)
        ]
        for node in self._module.graph.nodes:
            if node.op == "get_attr":
                slots[node] = n_slots
                self._attributes.append((n_slots, _attribute(self._module, str(node.target))))
                n_slots += 1
        for region in regions:
            sources = [slots[node] for node in region.values]
            for item, terms in region.packed:
                key = (item.layout.name, terms, item.tensor)
                if key not in packed_slots:
                    packed_slots[key] = n_slots
                    self._packed.append((item.layout, terms, item.tensor, n_slots))
                    n_slots += 1
                sources.append(packed_slots[key])
            targets = []
            for node in region.outputs:
                slots[node] = n_slots
                targets.append(n_slots)
                n_slots += 1
            self._steps.append((region.function, sources, targets))
        self._n_slots = n_slots
        output = self._module.graph.output_node().args[0]
        flat = output if isinstance(output, list | tuple) else [output]
        self._outputs = [slots[node] if isinstance(node, fx.Node) else node for node in flat]
        self._constant_outputs = [not isinstance(node, fx.Node) for node in flat]
        self._last_use()

    def _last_use(self) -> None:
        """Which slots to release after each step, so that activations do not outlive their use."""
        assert self._outputs is not None
        keep = {
            slot for slot, constant in zip(self._outputs, self._constant_outputs, strict=True) if not constant
        }
        produced = {slot for _, _, targets in self._steps for slot in targets}
        last: dict[int, int] = {}
        for index, (_, sources, targets) in enumerate(self._steps):
            for slot in [*sources, *targets]:
                last[slot] = index
        self._release: list[list[int]] = [[] for _ in self._steps]
        for slot, index in last.items():
            if slot in produced and slot not in keep:
                self._release[index].append(slot)

    def __call__(self, *args: Any) -> Any:
        """Run with Dynamo's flat inputs."""
        values: list[Any] = [None] * self._n_slots
        for index, slot in self._arguments:
            values[slot] = args[index]
        for slot, tensor in self._binding(args).constants:
            values[slot] = tensor
        with torch.no_grad():
            if self._outputs is None:
                function, sources, _ = self._steps[0]
                return function([values[slot] for slot in sources])
            for (function, sources, targets), release in zip(self._steps, self._release, strict=True):
                results = function([values[slot] for slot in sources])
                for slot, result in zip(targets, results, strict=True):
                    values[slot] = result
                for slot in release:
                    values[slot] = None
        return tuple(
            slot if constant else values[slot]
            for slot, constant in zip(self._outputs, self._constant_outputs, strict=True)
        )

    def replay(self, args: Sequence[Any]) -> Callable[[], None]:
        """The call with these arguments again and again, for callers that change their contents only.

        Nothing is checked and results are dropped; what the graph writes into its arguments is what counts.
        """
        base: list[Any] = [None] * self._n_slots
        for index, slot in self._arguments:
            base[slot] = args[index]
        for slot, tensor in self._binding(args).constants:
            base[slot] = tensor
        produced = {slot for _, _, targets in self._steps for slot in targets}
        steps = [
            (
                function,
                [base[slot] for slot in sources],
                [(place, slot) for place, slot in enumerate(sources) if slot in produced],
                targets if self._outputs is not None else [],
            )
            for function, sources, targets in self._steps
        ]

        def run() -> None:
            values: dict[int, Any] = {}
            for function, template, holes, targets in steps:
                inputs = template.copy()  # compiled code empties it
                for place, slot in holes:
                    inputs[place] = values[slot]
                results = function(inputs)
                for slot, result in zip(targets, results, strict=False):
                    values[slot] = result

        return run

    def _binding(self, args: Sequence[Any]) -> _Binding:
        for number, binding in enumerate(self._bindings):
            if self._fits(binding, args):
                if number:
                    self._bindings.insert(0, self._bindings.pop(number))
                return self._bindings[0]
        self._bindings = [b for b in self._bindings if all(owner() is not None for owner in b.owners)]
        weights = self._weights_from(args)
        binding = self._bind(weights, self._rebind(weights), args)
        self._bindings = [b for b in self._bindings if not self._same_owners(b, binding)]
        self._bindings.insert(0, binding)
        return binding

    def _fits(self, binding: _Binding, args: Sequence[Any]) -> bool:
        for index, owner, version in zip(self._compressed, binding.owners, binding.versions, strict=True):
            if args[index] is not owner() or version_of(args[index]) != version:
                return False
        return True

    @staticmethod
    def _same_owners(one: _Binding, two: _Binding) -> bool:
        return all(a() is b() for a, b in zip(one.owners, two.owners, strict=True))

    def _bind(self, weights: dict[str, Tensor], store: WeightStore, args: Sequence[Any]) -> _Binding:
        owners = [weights[self._program.weight_of[self._placeholders[index]]] for index in self._compressed]
        constants = list(self._attributes)
        for ref, slot in self._forms:
            constants.append((slot, store.tensor(ref)))
        for layout, terms, tensor, slot in self._packed:
            packed = store.packed(layout, terms)
            if tensor not in packed:
                raise _other_form(terms[0].name)
            constants.append((slot, packed[tensor]))
        self._check_types(constants)
        return _Binding(
            [weakref.ref(owner) for owner in owners], [version_of(owner) for owner in owners], constants
        )

    def _check_types(self, constants: Sequence[tuple[int, Any]]) -> None:
        """Compiled code relies on the shapes it was compiled for; a rank or a grid may differ elsewhere."""
        types = {slot: (value.shape, value.dtype) for slot, value in constants if isinstance(value, Tensor)}
        expected = self._types = types if self._types is None else self._types
        if types != expected:
            names = {slot: ref.name for ref, slot in self._forms}
            names.update({slot: terms[0].name for _, terms, _, slot in self._packed})
            wrong = next(slot for slot in types if types[slot] != expected.get(slot))
            raise _other_form(names.get(wrong, "a constant"))

    def _weights(self, program: Program) -> dict[str, Tensor]:
        return dict(program.weights)

    def _weights_from(self, args: Sequence[Any]) -> dict[str, Tensor]:
        weights = self._weights(self._program)
        for index, name in enumerate(self._placeholders):
            if name in self._program.weight_of:
                weights[self._program.weight_of[name]] = args[index]
        return weights


def _other_form(name: str) -> BindingError:
    return BindingError(
        f"{name}: these parameters were compressed to another form than the compiled graph expects.",
        fix="compile the second model separately.",
    )


def version_of(tensor: Tensor) -> int:
    """The in-place version of a tensor (0 for inference tensors, which have none)."""
    return 0 if tensor.is_inference() else tensor._version


def _attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for step in path.split("."):
        value = getattr(value, step)
    return value
