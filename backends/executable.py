"""What Dynamo calls: bind packed weights to the parameters actually passed, then run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.execution_plan import ExecutionPlan
from fxcompress.errors import BindingError
from fxcompress.store import WeightStore

# Given the real weights of a call by canonical name, the store that holds their packed form.
Rebind = Callable[[dict[str, Tensor]], WeightStore]


@dataclass
class _Binding:
    """Packed tensors for one set of parameters."""

    owners: list[weakref.ref[Tensor]]
    versions: list[int]
    constants: list[tuple[int, Tensor]]  # slot → packed or form tensor


@dataclass(frozen=True)
class Trace:
    """What a graph was made from.

    Args:
        sizes: The symbolic sizes among its arguments.
        files: Of all code that was traced; None where unknown.
    """

    sizes: tuple[torch.SymInt, ...]
    files: tuple[str, ...] | None


@dataclass(frozen=True)
class Call:
    """One call of an executable, as :func:`watch_calls` saw it."""

    executable: Executable
    arguments: tuple[Any, ...]
    results: Sequence[Any]


_WATCHED: ContextVar[list[Call] | None] = ContextVar("fxcompress calls", default=None)


@contextmanager
def watch_calls() -> Iterator[list[Call]]:
    """All calls of executables inside the block, in order."""
    calls: list[Call] = []
    token = _WATCHED.set(calls)
    try:
        yield calls
    finally:
        _WATCHED.reset(token)


class Executable:
    """A compiled graph, called with Dynamo's flat inputs.

    Parameters are checked by identity (and, where weights were packed from live parameters, by version) on
    every call: a second instance of the class, a reassigned or reloaded parameter is bound to its own packed
    weights, never to somebody else's.

    Args:
        plan: Slots and steps.
        weights: The parameters seen while compiling, by name.
        store: Their packed weights.
        rebind: Called when other parameters arrive.
        trace: What the graph was made from.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        weights: Mapping[str, Tensor],
        store: WeightStore,
        rebind: Rebind,
        trace: Trace | None = None,
    ) -> None:
        self.plan = plan
        self._trace = trace
        self._known = dict(weights)
        self._rebind = rebind
        self._release = plan.releases()
        self._types: dict[int, tuple[torch.Size, torch.dtype]] | None = None  # of the constants, by slot
        self._bindings = [self._bind(self._known, store)]

    def __call__(self, *args: Any) -> Any:
        """Run with Dynamo's flat inputs."""
        results = self._run(args)
        watched = _WATCHED.get()
        if watched is not None:
            watched.append(Call(self, args, results))
        return results

    def _run(self, args: Sequence[Any]) -> Any:
        plan = self.plan
        values: list[Any] = [None] * plan.slots
        for index, slot in plan.arguments:
            values[slot] = args[index]
        for slot, tensor in self._binding(args).constants:
            values[slot] = tensor
        with torch.no_grad():
            if plan.outputs is None:
                (only,) = plan.steps
                return only.function([values[slot] for slot in only.sources])
            for step, release in zip(plan.steps, self._release, strict=True):
                results = step.function([values[slot] for slot in step.sources])
                for slot, result in zip(step.targets, results, strict=True):
                    values[slot] = result
                for slot in release:
                    values[slot] = None
        return tuple(
            slot if constant else values[slot]
            for slot, constant in zip(plan.outputs, plan.constant_outputs, strict=True)
        )

    def is_bound_to(self, args: Sequence[Any]) -> bool:
        """Whether the compressed weights among the arguments are those of the last call."""
        return self._fits(self._bindings[0], args)

    def take_trace(self) -> Trace | None:
        """What the graph was made from; asked again, None: it is much to hold."""
        found, self._trace = self._trace, None
        return found

    def replay(self, args: Sequence[Any]) -> Callable[[], None]:
        """The call with these arguments again and again, for callers that change their contents only.

        Nothing is checked and results are dropped; what the graph writes into its arguments is what counts.
        """
        plan = self.plan
        base: list[Any] = [None] * plan.slots
        for index, slot in plan.arguments:
            base[slot] = args[index]
        for slot, tensor in self._binding(args).constants:
            base[slot] = tensor
        produced = plan.produced
        steps = [
            (
                step.function,
                [base[slot] for slot in step.sources],
                [(place, slot) for place, slot in enumerate(step.sources) if slot in produced],
                step.targets,
            )
            for step in plan.steps
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
        weights = {**self._known, **{name: args[index] for index, name in self.plan.weights.items()}}
        binding = self._bind(weights, self._rebind(weights))
        self._bindings = [b for b in self._bindings if not self._same_owners(b, binding)]
        self._bindings.insert(0, binding)
        return binding

    def _fits(self, binding: _Binding, args: Sequence[Any]) -> bool:
        for index, owner, version in zip(self.plan.compressed, binding.owners, binding.versions, strict=True):
            if args[index] is not owner() or version_of(args[index]) != version:
                return False
        return True

    @staticmethod
    def _same_owners(one: _Binding, two: _Binding) -> bool:
        return all(a() is b() for a, b in zip(one.owners, two.owners, strict=True))

    def _bind(self, weights: Mapping[str, Tensor], store: WeightStore) -> _Binding:
        plan = self.plan
        owners = [weights[plan.weights[index]] for index in plan.compressed]
        constants = list(plan.attributes)
        for ref, slot in plan.forms:
            constants.append((slot, store.tensor(ref)))
        for item in plan.packed:
            packed = store.packed(item.layout, item.terms)
            if item.tensor not in packed:
                raise _other_form(item.terms[0].name)
            constants.append((item.slot, packed[item.tensor]))
        self._check_types(constants)
        return _Binding(
            [weakref.ref(owner) for owner in owners], [version_of(owner) for owner in owners], constants
        )

    def _check_types(self, constants: Sequence[tuple[int, Any]]) -> None:
        """Compiled code relies on the shapes it was compiled for; a rank or a grid may differ elsewhere."""
        types = {slot: (value.shape, value.dtype) for slot, value in constants if isinstance(value, Tensor)}
        expected = self._types = types if self._types is None else self._types
        if types != expected:
            names = {slot: ref.name for ref, slot in self.plan.forms}
            names.update({item.slot: item.terms[0].name for item in self.plan.packed})
            wrong = next(slot for slot in types if types[slot] != expected.get(slot))
            raise _other_form(names.get(wrong, "a constant"))


def _other_form(name: str) -> BindingError:
    return BindingError(
        f"{name}: these parameters were compressed to another form than the compiled graph expects.",
        fix="compile the second model separately.",
    )


def version_of(tensor: Tensor) -> int:
    """The in-place version of a tensor (0 for inference tensors, which have none)."""
    return 0 if tensor.is_inference() else tensor._version


__all__ = ["Call", "Executable", "Trace", "version_of", "watch_calls"]
