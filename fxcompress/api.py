"""The public functions: compress and load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcompress.artifact import build_artifact, read_artifact
from fxcompress.calibration import as_calibration
from fxcompress.calibration.generated import generated_tokens
from fxcompress.calibration.inputs import SAMPLES
from fxcompress.capture import Program, capture_model
from fxcompress.errors import CalibrationError, RecipeError, WeightError
from fxcompress.examples import call_arguments, default_example
from fxcompress.generation_cache import check_has_cache
from fxcompress.ghost import contains_ghosts
from fxcompress.hf import identity_of, load_tokenizer
from fxcompress.machine import torch_device
from fxcompress.manager import Verify, run_recipe
from fxcompress.model import CompressedModel, remove_with, temporary_artifact
from fxcompress.progress import ProgressOption
from fxcompress.recipe import Recipe
from fxcompress.registry import backend_class
from fxcompress.structure.build import build_cut_module
from fxcompress.structure.load import module_for

__all__ = ["compress", "load"]


def compress(
    model: nn.Module,
    recipe: Any,
    calibration: Any | None = None,
    *,
    tokenizer: Any | None = None,
    example_inputs: Any | None = None,
    verify: Verify = "end",
    seed: int = 0,
    progress: ProgressOption = True,
    checkpoint: str | Path | None = None,
    samples: int = SAMPLES,
) -> CompressedModel:
    """Compress a model.

    Args:
        model: Any module that ``torch.export`` can capture; not modified.
        recipe: A preset's name (:func:`fxcompress.recipes`), a YAML file, a Recipe, a pass or a list of
            passes.
        calibration: Text file, list of strings (both need ``tokenizer``), tensors, dicts of inputs, an
            iterable or DataLoader of these, or a callable that returns them. When a recipe needs data and
            none are given, a model that can generate samples text from itself; for other models this is an
            error.
        tokenizer: For calibration text; saved with the artifact.
        example_inputs: One call of the model: a tensor, a tuple of positional or a dict of keyword arguments.
            Default: made from the calibration data or, for transformers models, from their configuration.
        verify: ``"each"``, ``"end"`` or ``"off"``: prove function-preserving passes in float64, measure
            errors per pass, and the end-to-end difference.
        seed: Makes the run deterministic.
        progress: Show a progress bar.
        checkpoint: Directory where finished steps are kept; a killed run continues from there.
        samples: At most this many sequences of the calibration data are used. Default 32; a recipe that
            trains (``distill``) wants hundreds.

    Returns:
        The compressed model; the original stays as it was.

    Raises:
        RecipeError: unknown or illegal recipe, or the model is already compressed.
        CaptureError: the model cannot be captured.
        CalibrationError: data missing or unusable.
        WeightError: a weight is NaN, inf or on another device.
        CoverageError: the recipe changed nothing.

    Example:
        >>> small = fxcompress.compress(model, "w4a16-gptq", "corpus.txt", tokenizer=tokenizer)
        >>> small.report.show()
    """
    if isinstance(model, CompressedModel) or contains_ghosts(model):
        raise RecipeError(
            "the model is already compressed.", fix="compress the original with one longer recipe."
        )
    chosen = Recipe.load(recipe)
    _check_devices(model)
    if any("quantized-cache" in item.provides for item in chosen):
        check_has_cache(model)
    if calibration is None and chosen.needs_calibration and example_inputs is None:
        calibration = _own_text(model, seed, samples)
    with torch.no_grad():
        program = _capture(model, calibration, example_inputs)
        if calibration is None and chosen.needs_calibration:
            calibration = _own_text(model, seed, samples)
        data = None
        if calibration is not None:
            data = as_calibration(calibration, program, tokenizer=tokenizer, samples=samples)
        examples = None
        if data is None:
            examples = as_calibration([default_call(model, example_inputs)], program)
        result = run_recipe(
            program,
            chosen,
            data,
            examples=examples,
            seed=seed,
            verify=verify,
            progress=progress,
            checkpoint=checkpoint,
        )
        module, structure, identity = model, None, identity_of(model)
        if result.rounds:
            shown = data or examples
            assert shown is not None
            built = build_cut_module(model, result.program, result.rounds, shown.sample(1).flat()[0])
            module, structure, identity = built.module, built.structure, built.identity
            result.report.structure |= built.describe()
        artifact = build_artifact(
            recipe=chosen.to_dict(),
            state=result.state,
            report=result.report.to_dict(),
            module=module,
            identity=identity,
            aliases=result.program.aliases,
            structure=structure,
        )
        stored, folder = temporary_artifact(artifact, tokenizer)
    small = CompressedModel(module, stored, tokenizer=tokenizer)
    remove_with(small, folder)
    return small


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    backend: str = "inductor",
    device: str | torch.device | None = None,
) -> CompressedModel:
    """Load a saved compression.

    Args:
        path: Directory written by :meth:`CompressedModel.save`.
        model: A module built like the compressed one (any weights). Not needed for transformers models, which
            are built from the stored configuration.
        backend: ``"inductor"`` or ``"eager"``.
        device: Where it runs, e.g. ``"cuda"``. Default None: where ``model`` is, else the CPU.

    Raises:
        ArtifactError: missing, damaged, newer or unsafe.
        BindingError: ``model`` has other parameters than the compressed one.
        FxCompressError: there is no such device.

    Example:
        >>> small = fxcompress.load("out")
        >>> small.generate(**inputs)
    """
    where = None if device is None else torch_device(device)
    begin = getattr(backend_class(backend), "begin", None)
    if begin is not None:
        begin()
    artifact = read_artifact(path)
    return CompressedModel(
        module_for(artifact, model),
        artifact,
        backend=backend,
        tokenizer=load_tokenizer_if_any(path, artifact.identity.kind),
        device=where,
    )


def load_tokenizer_if_any(path: str | Path, kind: str) -> Any | None:
    """The tokenizer saved with an artifact of a transformers model."""
    return load_tokenizer(path) if kind == "transformers" else None


def default_call(model: nn.Module, example_inputs: Any | None) -> Any:
    """One call of the model as a mapping or tuple: the given example, or one made from its configuration."""
    args, kwargs = call_arguments(model, default_example(model) if example_inputs is None else example_inputs)
    return args if args else kwargs


def _capture(model: nn.Module, calibration: Any | None, example_inputs: Any | None) -> Program:
    example = example_inputs
    if example is None:
        example = _first_call(calibration)
    if example is None:
        example = default_example(model)
    args, kwargs = call_arguments(model, example)
    return capture_model(model, args, kwargs)


def _first_call(calibration: Any) -> Any | None:
    """The first sample of calibration data that already are model inputs; None for text and callables."""
    if isinstance(calibration, list | tuple) and calibration and not isinstance(calibration[0], str):
        return calibration[0] if isinstance(calibration, list) else calibration
    if isinstance(calibration, torch.Tensor | Mapping):
        return calibration
    return None


def _own_text(model: nn.Module, seed: int, samples: int) -> Any:
    if not hasattr(model, "generate"):
        raise CalibrationError(
            "the recipe needs calibration data and none were given.",
            fix="pass calibration=..., e.g. a few batches of typical inputs.",
        )
    return generated_tokens(model, samples=samples, seed=seed)


def _check_devices(model: nn.Module) -> None:
    devices = {str(tensor.device): name for name, tensor in model.named_parameters()}
    if not devices:
        raise WeightError(f"{type(model).__name__} has no parameters.", fix="there is nothing to compress.")
    if "meta" in devices:
        raise WeightError(f"{devices['meta']}: has no values (meta device).", fix="load the weights first.")
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in sorted(devices.items()))
        raise WeightError(f"the model is spread over several devices: {found}.", fix="move it to one device.")
