"""Build the module that a run's cuts leave: by its configuration, by its attributes, or from the graph.

Three ways, in this order, each proven by running the result:

1. The class of a transformers model builds the cut model from a changed configuration (all layers alike).
2. A copy of the module, with cut tensors and the attributes that hold their sizes changed.
3. A module that runs the cut graph. It has no cache, so it does not generate.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fxcompress.artifact.content import Identity, computed_buffers, stored_tensors
from fxcompress.capture.export import tied_names
from fxcompress.capture.program import Program
from fxcompress.errors import FxCompressError
from fxcompress.hf import build_model, identity_of
from fxcompress.structure.attributes import find_candidates, search
from fxcompress.structure.commit import Committed
from fxcompress.structure.configuration import changed_content, config_content, find_configuration
from fxcompress.structure.module import apply_structure
from fxcompress.structure.program_module import ProgramModule, describe_call
from fxcompress.structure.proof import (
    cache_shapes,
    call_of,
    generation_differs,
    outputs_differ,
    shapes_differ,
)
from fxcompress.structure.record import StoredTensor, Structure, follow
from fxcompress.structure.sizes import all_sizes, lengths_of, pattern, uneven

__all__ = ["Built", "build_cut_module"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Built:
    """A module that follows the cuts.

    Args:
        module: In evaluation mode; parameters have the program's values.
        structure: How it was made, as data.
        identity: What an artifact of it is named by.
    """

    module: nn.Module
    structure: Structure
    identity: Identity

    def describe(self) -> dict[str, Any]:
        """For the report: how the module follows."""
        structure = self.structure
        if structure.graph:
            return {"module": f"the cut graph runs, without a cache: {structure.graph}"}
        way = (
            "built from a changed configuration"
            if structure.from_config
            else "a copy with changed attributes"
        )
        changed = {
            f"{pattern(change.owner)}.{change.name}".lstrip("."): [change.old, change.new]
            for change in (*structure.config, *structure.attributes)
        }
        return {"module": f"{way}; its outputs are those of the cut graph", "changed": changed}


def build_cut_module(
    model: nn.Module, program: Program, rounds: Sequence[Committed], flat: Sequence[Any]
) -> Built:
    """The module that computes what the cut ``program`` computes.

    Args:
        model: The original; not modified.
        program: The original's program after all cuts.
        rounds: What was cut.
        flat: Flat inputs of one call, for the proof.
    """
    return _Builder(model, program, rounds, flat).build()


class _Builder:
    def __init__(
        self, model: nn.Module, program: Program, rounds: Sequence[Committed], flat: Sequence[Any]
    ) -> None:
        self.model, self.program, self.flat = model, program, flat
        self.changes = tuple(committed.change for committed in rounds)
        self.sizes = all_sizes((committed.change, committed.cuts) for committed in rounds)
        self.canonical, _ = tied_names(model)
        original = {
            self.canonical.get(name, name): StoredTensor(tuple(value.shape), value.dtype, role)
            for name, value, role in reversed(list(stored_tensors(model)))
        }
        self.structure = Structure(self.changes, original, buffers=_kept_of_buffers(model, rounds))
        self.lengths = lengths_of(self.canonical, self.changes)
        self.expected = program.run_flat(flat)
        _, kwargs = call_of(program, flat)
        main = kwargs.get(str(getattr(model, "main_input_name", "")))
        self.ids = main[:1, :8] if isinstance(main, Tensor) and main.dim() == 2 else None

    @functools.cached_property
    def traceable(self) -> bool:
        """Whether the original runs on shapes alone; models that branch on data do not."""
        return not shapes_differ(self.model, self.program, self.flat)

    def build(self) -> Built:
        """Try the three ways."""
        reasons = []
        for way in (self._from_configuration, self._from_attributes):
            built = way()
            if isinstance(built, Built):
                return built
            reasons.append(built)
        why = "; ".join(filter(None, reasons))
        logger.warning("%s: the cut graph runs instead of the module: %s", type(self.model).__name__, why)
        structure = replace(self.structure, graph=why, call=describe_call(self.program, self.flat))
        return Built(
            ProgramModule(self.program, tuple(self._persistent())), structure, identity_of(self.model)
        )

    def _values(self, name: str, tensor: Tensor) -> Tensor:
        """What a parameter or persistent buffer of the cut model holds."""
        return self.program.weights.get(self.program.aliases.get(name, name), tensor.detach())

    def _persistent(self) -> Iterator[str]:
        """Names of the buffers that are saved."""
        for name, _, role in stored_tensors(self.model):
            new = follow(self.canonical.get(name, name), self.changes)
            if role == "buffer" and new is not None:
                yield new

    def _from_configuration(self) -> Built | str:
        identity = identity_of(self.model)
        if identity.kind != "transformers" or self.structure.buffers:
            return ""
        if uneven(self.sizes):
            return "layers were cut to sizes of their own"
        wanted = {}
        for name, tensor, _ in stored_tensors(self.model):
            new = follow(name, self.changes)
            if new is not None:
                wanted[new] = tuple(self._values(new, tensor).shape)
        found = find_configuration(self.model, wanted, self.sizes, self.lengths)
        if found is None:
            return "no configuration of its class has these sizes"
        model: Any = self.model
        content = changed_content(config_content(model.config), found)
        built = build_model(type(model), content)
        built.config._attn_implementation = model.config._attn_implementation
        if getattr(model, "generation_config", None) is not None:
            built.generation_config = copy.deepcopy(model.generation_config)
        self._bind(built)
        wrong = self._wrong(built)
        if wrong:
            return f"built from its configuration: {wrong}"
        structure = replace(self.structure, config=found, from_config=True)
        return Built(built, structure, replace(identity, config=content))

    def _bind(self, built: nn.Module) -> None:
        """Give a freshly built module the tensors of the cut model."""
        originals = {
            new: tensor
            for name, tensor in [
                *self.model.named_parameters(remove_duplicate=False),
                *self.model.named_buffers(remove_duplicate=False),
            ]
            if (new := follow(name, self.changes)) is not None
        }
        made: dict[str, nn.Parameter] = {}
        for prefix, owner in built.named_modules():
            for key, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{key}".lstrip(".")
                canonical = self.program.aliases.get(name, name)
                if canonical not in made:
                    value = self._values(name, originals[name])
                    made[canonical] = nn.Parameter(value.detach(), requires_grad=False)
                owner._parameters[key] = made[canonical]
            for key, buffer in owner._buffers.items():
                name = f"{prefix}.{key}".lstrip(".")
                if buffer is not None and name in originals:
                    owner._buffers[key] = self._values(name, originals[name]).clone()
        built.eval()

    def _from_attributes(self) -> Built | str:
        structure = self.structure
        if self.lengths and hasattr(self.model, "config"):
            structure = replace(structure, config=self._length_changes())
        try:
            clone = apply_structure(self.model, structure, self._values)
        except FxCompressError as error:
            return str(error)
        before = {}
        for name, tensor, _ in stored_tensors(self.model):
            new = follow(name, self.changes)
            if new is not None:
                before[new] = tuple(tensor.shape)
        candidates = find_candidates(clone, before, self.sizes.values())
        found, wrong = search(clone, candidates, lambda: self._wrong(clone))
        if wrong:
            return f"with changed attributes: {wrong}"
        cache = () if self.ids is None else cache_shapes(clone, self.ids)
        structure = replace(structure, attributes=found, cache=cache)
        return Built(clone, structure, identity_of(self.model))

    def _length_changes(self) -> tuple[Any, ...]:
        """Changes of the configuration that belong to removed list entries alone."""
        if identity_of(self.model).kind != "transformers":
            return ()
        wanted = {
            new: tuple(tensor.shape)
            for name, tensor, _ in stored_tensors(self.model)
            if (new := follow(name, self.changes)) is not None
        }
        return find_configuration(self.model, wanted, {}, self.lengths) or ()

    def _wrong(self, module: nn.Module) -> str:
        wrong = outputs_differ(module, self.program, self.flat, self.expected)
        if not wrong and self.traceable:
            wrong = shapes_differ(module, self.program, self.flat)
        if wrong or self.ids is None:
            return wrong
        return generation_differs(module, self.model, self.ids)


def _kept_of_buffers(
    model: nn.Module, rounds: Sequence[Committed]
) -> Mapping[str, Mapping[int, tuple[int, ...]]]:
    """What is kept of buffers that the module computes itself, over all rounds."""
    computed = dict(computed_buffers(model))
    kept: dict[str, dict[int, Tensor]] = {}
    for committed in rounds:
        kept = {new: dims for name, dims in kept.items() if (new := follow(name, [committed.change]))}
        for name, dims in committed.buffers.items():
            for dim, positions in dims.items():
                earlier = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = positions if earlier is None else earlier[positions]
    names = {follow(name, [committed.change for committed in rounds]) for name in computed}
    return {
        name: {dim: tuple(positions.tolist()) for dim, positions in dims.items()}
        for name, dims in kept.items()
        if name in names
    }
