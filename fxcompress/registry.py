"""The catalogue of passes and backends: names to ``"module:Class"`` strings, imported only when asked for.

This is the only place where the core names a pass or a backend. Third parties add theirs through the
entry-point groups ``fxcompress.passes`` and ``fxcompress.backends``, or at run time through
:func:`register_pass`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any, TypeVar

from fxcompress.errors import BackendError, FxCompressError, RecipeError
from fxcompress.pass_base import Pass

__all__ = [
    "BUILTIN_BACKENDS",
    "BUILTIN_EXPORTERS",
    "BUILTIN_PASSES",
    "backend_class",
    "backend_names",
    "close_matches",
    "exporter",
    "pass_class",
    "pass_names",
    "register_pass",
]

PASS_GROUP = "fxcompress.passes"
BACKEND_GROUP = "fxcompress.backends"

BUILTIN_PASSES: dict[str, str] = {
    "remove-blocks": "fxcompress.passes.remove_blocks:RemoveBlocks",
    "prune-channels": "fxcompress.passes.prune_channels:PruneChannels",
    "smooth-activations": "fxcompress.passes.smooth_activations:SmoothActivations",
    "suppress-outliers": "fxcompress.passes.suppress_outliers:SuppressOutliers",
    "balance-attention": "fxcompress.passes.balance_attention:BalanceAttention",
    "awq": "fxcompress.passes.awq:Awq",
    "clip-weights": "fxcompress.passes.clip_weights:ClipWeights",
    "reorder-channels": "fxcompress.passes.reorder_channels:ReorderChannels",
    "permute-channels": "fxcompress.passes.permute_channels:PermuteChannels",
    "allocate-sparsity": "fxcompress.passes.allocate_sparsity:AllocateSparsity",
    "prune-magnitude": "fxcompress.passes.prune_magnitude:PruneMagnitude",
    "wanda": "fxcompress.passes.wanda:Wanda",
    "sparsegpt": "fxcompress.passes.sparsegpt:SparseGpt",
    "e-sparse": "fxcompress.passes.e_sparse:ESparse",
    "dsnot": "fxcompress.passes.dsnot:Dsnot",
    "svd": "fxcompress.passes.svd:Svd",
    "fwsvd": "fxcompress.passes.fwsvd:Fwsvd",
    "asvd": "fxcompress.passes.asvd:Asvd",
    "svd-llm": "fxcompress.passes.svd_llm:SvdLlm",
    "lplr": "fxcompress.passes.lplr:Lplr",
    "laser": "fxcompress.passes.laser:Laser",
    "gptq": "fxcompress.passes.gptq:Gptq",
    "quantize-weights": "fxcompress.passes.quantize_weights:QuantizeWeights",
    "quantize-codebook": "fxcompress.passes.quantize_codebook:QuantizeCodebook",
    "low-rank-residual": "fxcompress.passes.low_rank_residual:LowRankResidual",
    "quantize-activations": "fxcompress.passes.quantize_activations:QuantizeActivations",
    "split-outlier-features": "fxcompress.passes.split_outlier_features:SplitOutlierFeatures",
    "quantize-kv-cache": "fxcompress.passes.quantize_kv_cache:QuantizeKvCache",
    "kvquant": "fxcompress.passes.kvquant:Kvquant",
    "wkvquant": "fxcompress.passes.wkvquant:Wkvquant",
    "distill": "fxcompress.passes.distill:Distill",
    "layer-distill": "fxcompress.passes.layer_distill:LayerDistill",
    "insert-quant-dequant": "fxcompress.passes.insert_quant_dequant:InsertQuantDequant",
    "fuse-siblings": "fxcompress.passes.fuse_siblings:FuseSiblings",
    "pack-sparse": "fxcompress.passes.pack_sparse:PackSparse",
}
BUILTIN_EXPORTERS: dict[str, tuple[str, str]] = {
    "onnx": ("fxcompress.backends.onnx.models:export_model", "fxcompress[onnx]"),
}
"""File format → the function that writes it, and the extra it needs."""
PACKED_CACHE = "fxcompress.backends.packed_cache:PackedCache"
BUILTIN_BACKENDS: dict[str, str] = {
    "inductor": "fxcompress.backends.dynamo:InductorBackend",
    "eager": "fxcompress.backends.dynamo:EagerBackend",
}

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_registered: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=type[Pass])


def close_matches(name: str, known: Iterable[str]) -> str:
    """Help for a mistyped name: the closest known names, or all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(choices)}."


def register_pass(cls: P) -> P:
    """Make a pass known by its name for this process; also usable as a class decorator.

    Args:
        cls: A frozen dataclass derived from :class:`fxcompress.Pass` with a dashed ``name`` and a ``solve``.

    Returns:
        ``cls`` itself.

    Raises:
        RecipeError: the class is no valid pass, or the name belongs to another pass.

    Example:
        >>> @register_pass
        ... @dataclass(frozen=True)
        ... class RoundWeights(Pass):
        ...     name = "round-weights"
        ...     def solve(self, block): ...
    """
    check_pass_class(cls)
    old = _registered.get(cls.name)
    redefined = old is not None and _path(old) == _path(cls)  # a notebook cell that is run again
    if not redefined and cls.name in pass_names() and BUILTIN_PASSES.get(cls.name) != _path(cls):
        raise RecipeError(
            f"register_pass({cls.__qualname__}): the name {cls.name!r} belongs to another pass.",
            fix="choose another `name`.",
        )
    _registered[cls.name] = cls
    return cls


def check_pass_class(cls: Any) -> None:
    """Refuse anything that is not a usable pass class.

    Raises:
        RecipeError: saying what is missing.
    """
    where = getattr(cls, "__qualname__", repr(cls))
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise RecipeError(f"{where}: not a pass.", fix="derive the class from fxcompress.Pass.")
    if "__dataclass_fields__" not in vars(cls):
        raise RecipeError(f"{where}: not a dataclass.", fix="decorate it with @dataclass(frozen=True).")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(
            f"{where}: name is {name!r}, expected lower-case words joined by dashes.",
            fix='set a class attribute such as name = "round-weights".',
        )
    if inspect.isabstract(cls):
        raise RecipeError(f"{where}: solve() is missing.", fix="implement solve(self, block).")
    for attribute in ("requires", "provides", "conflicts"):
        value = getattr(cls, attribute)
        if not isinstance(value, property) and not (
            isinstance(value, frozenset) and all(isinstance(item, str) for item in value)
        ):
            raise RecipeError(f"{where}: {attribute} is {value!r}, expected a frozenset of strings.")
    names = {field.name for field in dataclasses.fields(cls)}
    if names & {"requires", "provides", "conflicts", "needs_calibration", "preserves_function"}:
        raise RecipeError(
            f"{where}: rules of a pass are class attributes, not options.", fix="annotate them with ClassVar."
        )


def pass_names() -> list[str]:
    """Names of all passes that can be used, sorted; imports none of them."""
    return sorted({*BUILTIN_PASSES, *_registered, *_entry_points(PASS_GROUP)})


def pass_class(name: str) -> type[Pass]:
    """The pass class of that name, imported now if need be.

    Raises:
        RecipeError: unknown name, two providers of it, or a provider that cannot be loaded.
    """
    if name in _registered:
        return _registered[name]
    cls = _find(name, BUILTIN_PASSES, PASS_GROUP, "pass", RecipeError)
    check_pass_class(cls)
    if cls.name != name:
        raise RecipeError(f"pass {name!r}: its class {cls.__qualname__} calls itself {cls.name!r}.")
    found: type[Pass] = cls
    return found


def backend_names() -> list[str]:
    """Names of all backends that can be asked for, sorted; imports none of them."""
    return sorted({*BUILTIN_BACKENDS, *_entry_points(BACKEND_GROUP)})


def backend_class(name: str) -> Any:
    """The backend class of that name, imported now if need be.

    Raises:
        BackendError: unknown name, two providers of it, or a provider that cannot be loaded.
    """
    return _find(name, BUILTIN_BACKENDS, BACKEND_GROUP, "backend", BackendError)


def exporter(name: str) -> Any:
    """The function that writes compressed models in the format ``name``, imported now if need be.

    Raises:
        BackendError: unknown format, or the packages it needs are not installed.
    """
    if name not in BUILTIN_EXPORTERS:
        raise BackendError(f"unknown export format {name!r}.", fix=close_matches(name, BUILTIN_EXPORTERS))
    (target, extra) = BUILTIN_EXPORTERS[name]
    module, _, function = target.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"export to {name} needs the package {error.name}, which is not installed.",
            fix=f"pip install '{extra}'",
        ) from error


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _entry_points(group: str) -> dict[str, list[metadata.EntryPoint]]:
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=group):
        providers = found.setdefault(point.name, [])
        if all(
            point.value != other.value for other in providers
        ):  # one install can be seen twice on sys.path
            providers.append(point)
    return found


def _find(name: str, builtin: dict[str, str], group: str, what: str, error: type[FxCompressError]) -> Any:
    points = _entry_points(group)
    providers = [builtin[name]] if name in builtin else []
    providers += [f"{point.module}:{point.attr}" for point in points.get(name, [])]
    if not providers:
        raise error(f"unknown {what} {name!r}.", fix=close_matches(name, {*builtin, *points, *_registered}))
    if len(providers) > 1:
        raise error(
            f"{what} {name!r} has several providers: {', '.join(providers)}.",
            fix="uninstall all but one, or ask its author for another name.",
        )
    module, _, qualname = providers[0].partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as failure:
        raise error(f"{what} {name!r}: {providers[0]} cannot be loaded: {failure}.") from failure
    return found
