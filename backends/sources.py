"""Where a Dynamo graph gets its compressed forms: a compressed model, an artifact, or a data-free recipe."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fxcompress.artifact import Artifact, read_artifact
from fxcompress.artifact.binding import check_value, known_name, rename_weights, state_of_artifact
from fxcompress.backends.executable import version_of
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.errors import BindingError, RecipeError
from fxcompress.ghost import dense_tag, ghost_tag
from fxcompress.manager import run_recipe
from fxcompress.recipe import Recipe
from fxcompress.store import WeightStore

DEFAULT_RECIPE = "w8a16"


class GhostSource:
    """Forms of a :class:`~fxcompress.CompressedModel`: parameters are ghosts that say what they stand for."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store

    def store(self, program: Program) -> WeightStore:
        """The store the program's ghosts belong to; renames the program's weights to the model's own names.

        Raises:
            BindingError: ghosts of several models in one graph.
        """
        names: dict[str, str] = {}
        owners: list[WeightStore] = []
        for name, tensor in program.weights.items():
            tag = ghost_tag(tensor) or dense_tag(tensor)
            if tag is None:
                if name in self._store.state.forms:  # another parameter took its place
                    names[name] = f"assigned:{name}"
                continue
            names[name] = tag.name
            if isinstance(tag.owner, WeightStore) and tag.owner not in owners:
                owners.append(tag.owner)
        if len(owners) > 1:
            raise BindingError(
                "one graph uses the weights of two compressed models.", fix="call the models separately."
            )
        rename_weights(program, names)
        return owners[0] if owners else self._store


class NoForms:
    """No forms: weights stay as they are, and only what the graph itself holds in packed form is served."""

    def store(self, program: Program) -> WeightStore:
        """A store without forms."""
        return WeightStore(CompressionState(program.weights))


class OwnFormsFirst:
    """Another source, except for the weights of a compressed model, which have forms already.

    Args:
        otherwise: For all other weights.
        asked: Whether a recipe or an artifact was asked for, which a compressed model cannot take.
    """

    def __init__(self, otherwise: ArtifactSource | RecipeSource | NoForms, *, asked: bool) -> None:
        self.otherwise = otherwise
        self.asked = asked

    def store(self, program: Program) -> WeightStore:
        """The store of the compressed model that owns the weights, else the other source's.

        Raises:
            BindingError: forms were asked for, or weights of several models are in one graph.
        """
        tags = (ghost_tag(tensor) or dense_tag(tensor) for tensor in program.weights.values())
        owners = (tag.owner for tag in tags if tag is not None)
        owner = next((owner for owner in owners if isinstance(owner, WeightStore)), None)
        if owner is None:
            return self.otherwise.store(program)
        if self.asked:
            raise BindingError(
                "these weights belong to a compressed model already.", fix="compile it without options."
            )
        return GhostSource(owner).store(program)


class ArtifactSource:
    """Forms of a saved artifact, for the uncompressed model it was made from.

    Args:
        path: The artifact's directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.artifact: Artifact = read_artifact(path)
        self._store: WeightStore | None = None
        self._checked: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def store(self, program: Program) -> WeightStore:
        """The artifact's store, after checking that the program's weights are those it was made from.

        Raises:
            BindingError: a weight is unknown to the artifact, or its content differs.
        """
        names: dict[str, str] = {}
        for name in program.parameters:
            known = known_name(self.artifact, name)
            names[name] = known
            self._check(known, program.weights[name])
        rename_weights(program, names)
        if self._store is None:
            state = state_of_artifact(self.artifact, dict(program.weights))
            self._store = WeightStore(state)
        else:
            self._store.state.weights = {**self._store.state.weights, **program.weights}
        return self._store

    def _check(self, name: str, tensor: Tensor) -> None:
        seen = self._checked.get(name)
        if seen is not None and seen[0]() is tensor and seen[1] == version_of(tensor):
            return
        check_value(self.artifact, name, tensor)
        self._checked[name] = (weakref.ref(tensor), version_of(tensor))


class RecipeSource:
    """Forms made on the spot by a data-free recipe from the parameters of each graph.

    Args:
        recipe: The recipe.

    Raises:
        RecipeError: the recipe needs calibration data, which a compiler backend does not have.
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.needs_calibration:
            raise RecipeError(
                f"recipe {recipe.name or 'given'!r} needs calibration data, which torch.compile cannot give.",
                fix="use fxcompress.compress(model, recipe, calibration), or a data-free recipe.",
            )
        self.recipe = recipe
        self._stores: dict[
            tuple[tuple[str, int, int], ...], tuple[list[weakref.ref[Tensor]], WeightStore]
        ] = {}

    def store(self, program: Program) -> WeightStore:
        """Compress the program's weights, or reuse what was made for the same tensors in another graph."""
        tensors = {name: program.weights[name] for name in sorted(program.parameters)}
        key = tuple((name, id(tensor), version_of(tensor)) for name, tensor in tensors.items())
        self._stores = {k: v for k, v in self._stores.items() if all(ref() is not None for ref in v[0])}
        if key not in self._stores:
            state = self._solve(program)
            self._stores[key] = ([weakref.ref(tensor) for tensor in tensors.values()], WeightStore(state))
        return self._stores[key][1]

    def _solve(self, program: Program) -> CompressionState:
        matrices = any(program.weights[name].dim() >= 2 for name in program.parameters)
        if not matrices:
            return CompressionState(program.weights)
        weights = {name: tensor.detach() for name, tensor in program.weights.items()}
        detached = Program(
            program.graph_module,
            program.weight_of,
            weights,
            program.parameters,
            program.aliases,
            program.inputs,
        )
        state = run_recipe(detached, self.recipe, None, verify="off").state
        if state.tensors:  # the compiled graph reads the user's own parameters
            raise RecipeError(
                f"{min(state.tensors)}: the recipe edits it in place, which torch.compile cannot do.",
                fix="end a pruning recipe with pack-sparse, or use fxcompress.compress(model, recipe).",
            )
        return state


def source_from_options(options: Mapping[str, Any]) -> ArtifactSource | RecipeSource | NoForms:
    """The source for ``torch.compile(..., options=...)``; artifacts and recipes are shared between graphs."""
    if "artifact" in options:
        path = str(Path(options["artifact"]).resolve())
        if path not in _ARTIFACTS:
            _ARTIFACTS[path] = ArtifactSource(path)
        return _ARTIFACTS[path]
    given = options.get("recipe", DEFAULT_RECIPE)
    if given is None:
        return NoForms()
    recipe = Recipe.load(given)
    key = recipe.to_yaml()
    if key not in _RECIPES:
        _RECIPES[key] = RecipeSource(recipe)
    return _RECIPES[key]


_ARTIFACTS: dict[str, ArtifactSource] = {}
_RECIPES: dict[str, RecipeSource] = {}
