"""Export of compressed models: what is captured, and what its inputs and outputs are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.apply import apply_state
from fxcompress.backends.onnx.decoders import CachedDecoder, write_generation_files
from fxcompress.backends.onnx.example_inputs import standard_trials
from fxcompress.backends.onnx.export import Options, Signature, export_program, run_applied, uncompiled
from fxcompress.backends.onnx.report import OnnxReport
from fxcompress.backends.onnx.saving import check_destination
from fxcompress.capture import capture_model
from fxcompress.capture.program import Program, flatten_call
from fxcompress.edits import CompressionState
from fxcompress.errors import BackendError, CalibrationError
from fxcompress.examples import call_arguments, default_example
from fxcompress.model import CompressedModel, entry_points

__all__ = ["export_model"]

_DIMENSIONS = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "decoder_input_ids": ("batch", "decoder_sequence"),
    "pixel_values": ("batch", "channels", "height", "width"),
}
"""Names that the ONNX ecosystem gives to the dimensions of well-known inputs."""


def export_model(
    model: CompressedModel,
    path: str | Path,
    *,
    cache: bool = False,
    example_inputs: Any | None = None,
    calibration: Sequence[Any] = (),
    **options: Any,
) -> OnnxReport:
    """Export a compressed model; see :meth:`fxcompress.CompressedModel.export_onnx`."""
    chosen = Options(**options)
    check_destination(Path(path), overwrite=chosen.overwrite)
    module: Any = model.model
    example = _with_mask(module, default_example(module)) if example_inputs is None else example_inputs
    with uncompiled(entry_points(module)), ungrouped_experts(module):
        if cache:
            return _export_decoder(model, Path(path), example, calibration, chosen)
        args, kwargs = call_arguments(module, example)
        program = capture_model(module, args, kwargs)
    further = [
        (f"calibration inputs {index}", _flat(program, module, inputs))
        for index, inputs in enumerate(calibration)
    ]
    flat = _of_two(flatten_call(program, args, kwargs))
    return export_program(
        program,
        state_of(model),
        path,
        flat,
        trials=[*standard_trials(program, flat), *further],
        signature=_signature(program),
        options=chosen,
    )


def _ids(example: Any, what: str) -> Tensor:
    ids = example.get("input_ids") if isinstance(example, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise BackendError(f"cache=True needs {what} with input_ids [batch, tokens].")
    return ids


def _export_decoder(
    model: CompressedModel, path: Path, example: Any, calibration: Sequence[Any], options: Options
) -> OnnxReport:
    module: Any = model.model
    ids, prompts = _ids(example, "example inputs"), [_ids(item, "calibration inputs") for item in calibration]
    if ids.shape[0] == 1:
        ids = torch.cat([ids, ids])
    state = state_of(model)
    _check_cache_is_plain(state)
    decoder = CachedDecoder.capture(module, ids)
    reference = apply_state(decoder.program, state)
    return export_program(
        decoder.program,
        state,
        path,
        decoder.example,
        trials=decoder.trials(
            lambda flat: run_applied(reference, state, flat),
            one_by_one=options.attention == "fused" and options.target != "portable",
            prompts=prompts,
        ),
        signature=decoder.signature,
        options=options,
        beside=lambda folder: write_generation_files(module, model.tokenizer, folder, path.name, decoder),
    )


def _check_cache_is_plain(state: CompressionState) -> None:
    """ONNX Runtime quantizes caches with calibrated symmetric scales only, which no form has."""
    caches = {name: form.cache for name, form in state.forms.items()}
    quantized = [name for name, cache in caches.items() if cache is not None and not cache.exact]
    if quantized:
        where = f"{len(quantized)} attentions ({quantized[0]}, …)"
        raise BackendError(
            f"{where} keep a quantized cache, which has no ONNX form.",
            fix="compress without the pass for caches, or export with cache=False.",
        )


@contextmanager
def ungrouped_experts(module: Any) -> Iterator[None]:
    """Let experts run as one product per token and expert: ONNX has no product of groups of rows."""
    configs = {
        id(part.config): part.config
        for part in module.modules()
        if getattr(getattr(part, "config", None), "_experts_implementation", None) is not None
    }
    held = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in held:
            config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, implementation in held:
            config._experts_implementation = implementation


def state_of(model: CompressedModel) -> CompressionState:
    """The forms of a compressed model."""
    return model._store.state


def _of_two(flat: list[Any]) -> list[Any]:
    """Inputs of a batch of two: a size of 1 would be taken for a constant."""
    tensors = [value for value in flat if isinstance(value, Tensor)]
    if tensors and all(value.dim() > 0 and value.shape[0] == 1 for value in tensors):
        return [torch.cat([value, value]) if isinstance(value, Tensor) else value for value in flat]
    return flat


def _flat(program: Program, module: nn.Module, inputs: Any) -> list[Any]:
    args, kwargs = call_arguments(module, inputs)
    if program.in_spec is not None and kwargs:
        known = set(program.in_spec.child(1).context or ())
        given = set(kwargs)
        if "attention_mask" in known - given and isinstance(kwargs.get("input_ids"), Tensor):
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
    flat = flatten_call(program, args, kwargs)
    if not any(isinstance(value, Tensor) for value in flat):
        raise CalibrationError(
            "calibration inputs hold no tensor.", fix="pass what the model is called with."
        )
    return flat


def _with_mask(module: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The example with an attention mask, when the model takes one: callers pad."""
    found = dict(example)
    parameters = inspect.signature(module.forward).parameters
    for ids, mask in (("input_ids", "attention_mask"),):
        if ids in found and mask in parameters:
            found[mask] = torch.ones_like(found[ids])
    return found


def _signature(program: Program) -> Signature:
    """Inputs keep the names of the call, outputs get those of the model's own structure."""
    names: list[str] = []
    if program.out_spec is not None:
        count = program.out_spec.num_leaves
        tree = pytree.tree_unflatten(list(range(count)), program.out_spec)
        for key_path, _ in pytree.tree_flatten_with_path(tree)[0]:
            steps = [
                str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in key_path
            ]
            names.append(".".join(steps))
    plain = all(names) and len(set(names)) == len(names) and not any(name[0].isdigit() for name in names)
    dimensions = {name: _DIMENSIONS[name] for name in program.inputs if name in _DIMENSIONS}
    return Signature({}, names if plain else (), dimensions)
