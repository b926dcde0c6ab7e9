"""An artifact in memory: what a run produced, independent of the module it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxcompress.artifact.storage import dtype_name, tensor_sha256, to_json
from fxcompress.edits import CompressionState
from fxcompress.errors import ArtifactError, BindingError
from fxcompress.forms import SiteForm
from fxcompress.structure.record import StoredTensor, Structure


@dataclass(frozen=True)
class Identity:
    """Whose weights an artifact holds.

    Args:
        kind: ``"transformers"``: a class of that library, rebuilt from ``config`` on loading. ``"module"``:
            the user's own; the caller brings the module, and ``class_name`` only serves messages (it is never
            imported).
        class_name: Bare class name for ``"transformers"``, qualified name otherwise.
        config: JSON content of ``config.json``; None for ``"module"``.
        generation_config: JSON content of ``generation_config.json``, if the model has one.
    """

    kind: Literal["transformers", "module"]
    class_name: str
    config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None

    @classmethod
    def of_module(cls, module: nn.Module) -> Identity:
        """The identity of a module that is no model of a known library."""
        return cls("module", f"{type(module).__module__}.{type(module).__qualname__}")


@dataclass(frozen=True)
class TensorInfo:
    """A parameter or persistent buffer as the (cut) model had it before compression.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        role: ``"parameter"`` or ``"buffer"``.
        sha256: Hash of its original value (row-major bytes).
        edited: Whether a pass changed its dense value.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Literal["parameter", "buffer"]
    sha256: str
    edited: bool = False


@dataclass
class Artifact:
    """The result of a run: everything :func:`fxcompress.load` needs.

    Every name of :attr:`parameters` has a dense tensor in :attr:`tensors`, or a form with weight terms in
    :attr:`forms`. Both mappings are lazy when the artifact was read from disk.

    Args:
        recipe: The recipe as plain data.
        forms: Parameter name → how its sites compute.
        tensors: Dense values, edited or original, by canonical name.
        fused: Groups of sibling sites computed as one product.
        aliases: Further name of a tied weight → canonical name.
        report: The coverage report as plain data.
        identity: Whose weights these are.
        parameters: Every parameter and persistent buffer by canonical name, as the model had it.
        computed: Dtype of every non-persistent buffer, whose value the module computes itself.
        structure: What was cut out of the original model; None when nothing was.
        directory: Where it was read from; None when it was made in this process.
    """

    recipe: dict[str, Any]
    forms: Mapping[str, SiteForm]
    tensors: Mapping[str, Tensor]
    fused: tuple[tuple[str, ...], ...]
    aliases: dict[str, str]
    report: dict[str, Any]
    identity: Identity
    parameters: dict[str, TensorInfo]
    computed: dict[str, torch.dtype] = field(default_factory=dict)
    structure: Structure | None = None
    directory: Path | None = field(default=None, compare=False)

    @property
    def fingerprint(self) -> str:
        """Sha256 of all names, shapes, dtypes and ties: equal for models that can swap weights."""
        layout = {
            name: [list(info.shape), str(info.dtype), info.role] for name, info in self.parameters.items()
        }
        return hashlib.sha256(to_json([layout, self.aliases])).hexdigest()

    def is_replaced(self, name: str) -> bool:
        """Whether weight terms stand for ``name``, so that it has no dense tensor."""
        return name in self.forms and bool(self.forms[name].terms)

    @property
    def layout(self) -> dict[str, torch.dtype]:
        """Dtype of every parameter of the model that the stored configuration builds, by any of its names."""
        if self.structure is not None and not self.structure.from_config:
            return {name: stored.dtype for name, stored in self.structure.original.items()}
        own = {name: info.dtype for name, info in self.parameters.items()}
        return own | {alias: own[name] for alias, name in self.aliases.items()}

    def check_module(self, module: nn.Module) -> None:
        """Check that ``module`` has exactly the parameters and buffers this artifact was made from.

        Raises:
            BindingError: names, shapes or dtypes differ; the message gives the first differences.
        """
        expected = {name: StoredTensor(i.shape, i.dtype, i.role) for name, i in self.parameters.items()}
        self._compare(module, expected, self.aliases)

    def check_original(self, module: nn.Module) -> None:
        """Check that ``module`` is built like the model that was compressed, before any cut.

        Raises:
            BindingError: names, shapes or dtypes differ; the message gives the first differences.
        """
        if self.structure is None:
            self.check_module(module)
            return
        first: dict[int, str] = {}
        ties = {name: first.setdefault(id(value), name) for name, value, _ in stored_tensors(module)}
        self._compare(module, self.structure.original, ties)

    def _compare(
        self, module: nn.Module, expected: Mapping[str, StoredTensor], aliases: Mapping[str, str]
    ) -> None:
        own = {aliases.get(name, name): value for name, value, _ in stored_tensors(module)}
        wrong = [f"{name}: missing from the module" for name in expected if name not in own]
        wrong += [f"{name}: unknown to the artifact" for name in own if name not in expected]
        for name, value in own.items():
            info = expected.get(name)
            if info and (tuple(value.shape), value.dtype) != (info.shape, info.dtype):
                wrong.append(
                    f"{name}: {tuple(value.shape)} {value.dtype} found, {info.shape} {info.dtype} expected"
                )
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise BindingError(
                f"the artifact of {self.identity.class_name} does not fit this {type(module).__name__}:"
                f" {'; '.join(wrong[:3])}{more}.",
                fix="pass a module built exactly as the compressed one was, in the same dtype.",
            )

    def restore_buffers(self, module: nn.Module) -> None:
        """Give the buffers of ``module`` their stored values, and those it computes itself their dtypes.

        Changes ``module``; its parameters are left alone.
        """
        for name, buffer in module.named_buffers():
            known = self.aliases.get(name, name)
            if known in self.tensors and self.tensors[known].shape == buffer.shape:
                buffer.data = self.tensors[known].to(buffer.device, copy=True)
            elif name in self.computed:
                buffer.data = buffer.data.to(self.computed[name])


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, Literal["parameter", "buffer"]]]:
    """Every parameter and persistent buffer under every name it has, parameters first.

    Non-persistent buffers are left out: the module computes them itself.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter, "parameter"
    for name, buffer, persistent in _buffers(module):
        if persistent:
            yield name, buffer, "buffer"


def computed_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every non-persistent buffer under every name it has."""
    for name, buffer, persistent in _buffers(module):
        if not persistent:
            yield name, buffer


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, value in owner._buffers.items():
            if value is not None:
                yield f"{prefix}.{key}".lstrip("."), value, key not in owner._non_persistent_buffers_set


def build_artifact(
    *,
    recipe: dict[str, Any],
    state: CompressionState,
    report: dict[str, Any],
    module: nn.Module,
    identity: Identity,
    aliases: Mapping[str, str],
    structure: Structure | None = None,
) -> Artifact:
    """Put together an artifact from the result of a run.

    Must be called while ``state.weights`` (or the module, for weights the graph never used) still holds the
    original values: their hashes are taken here. Tensors are shared, not copied.

    Args:
        recipe: The recipe as plain data.
        state: All edits of the run.
        report: The coverage report as plain data.
        module: The original module: names its parameters and buffers, and tells which buffers are persistent.
        identity: Whose weights these are.
        aliases: Further name of a tied weight → canonical name, as in ``Program.aliases``.
        structure: What was cut out of the original, if ``module`` is a cut one.

    Raises:
        ArtifactError: an edit concerns a tensor that the module does not own, or a dtype cannot be saved.
    """
    ties = dict(aliases)
    parameters: dict[str, TensorInfo] = {}
    tensors: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    for own_name, value, role in stored_tensors(module):
        name = ties.get(own_name, own_name)
        if name == own_name and name not in state.weights and id(value) in first_name:
            name = ties[own_name] = first_name[id(value)]
        first_name.setdefault(id(value), name)
        if name in parameters:
            continue
        original = state.weights[name] if name in state.weights else value.detach()
        dtype_name(original.dtype, name)
        edited = name in state.tensors
        parameters[name] = TensorInfo(
            tuple(original.shape), original.dtype, role, tensor_sha256(original), edited
        )
        if not state.is_compressed(name):
            tensors[name] = state.tensors[name] if edited else original
    foreign = [name for name in (*state.tensors, *state.forms) if name not in parameters]
    if foreign:
        raise ArtifactError(
            f"{foreign[0]}: edited, but the module does not store it as a parameter or persistent buffer.",
            fix="register it as a parameter or persistent buffer, or exclude it from the recipe.",
        )
    return Artifact(
        recipe=recipe,
        forms=dict(state.forms),
        tensors=tensors,
        fused=tuple(tuple(names) for names in state.fused),
        aliases={alias: name for alias, name in ties.items() if alias != name and name in parameters},
        report=report,
        identity=identity,
        parameters=parameters,
        computed={name: value.dtype for name, value in computed_buffers(module)},
        structure=structure,
    )
