"""Example inputs: one call of a model, given by the user or made from the model's own description."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import CaptureError

_LENGTH = 16


def call_arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an example (tensor, tuple or mapping) into ``(args, kwargs)``.

    A model that keeps a cache unless told otherwise is told so: the captured graph is the plain forward.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    if isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, tuple | list):
        args = tuple(example)
    elif hasattr(model, "main_input_name") and str(model.main_input_name) in parameters:
        kwargs = {str(model.main_input_name): example}
    else:
        args = (example,)
    accepts = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keeps_cache = hasattr(model, "config") and getattr(model.config, "use_cache", None)
    if keeps_cache and accepts and not args:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def default_example(model: nn.Module) -> dict[str, Tensor]:
    """A small example call for a transformers model, from its configuration and the inputs it names.

    Raises:
        CaptureError: the model does not describe its inputs.
    """
    name = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    if config is None or name is None:
        raise CaptureError(
            f"{type(model).__name__} does not say what its inputs are.",
            fix="pass example_inputs=... (a tensor, tuple or dict), or calibration inputs.",
        )
    example: dict[str, Tensor] = {}
    if name == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocabulary = int(text.vocab_size)
        ids = (torch.arange(2 * _LENGTH) * 7919 % max(vocabulary - 1, 1) + 1).clamp(max=vocabulary - 1)
        example = {"input_ids": ids.view(2, _LENGTH)}
        if getattr(config, "is_encoder_decoder", False):
            example["decoder_input_ids"] = example["input_ids"].clone()
    elif name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)
        example = {
            "pixel_values": torch.randn(2, int(vision.num_channels), height, width, generator=generator)
        }
    else:
        raise CaptureError(f"no default example for the input {name!r}.", fix="pass example_inputs=...")
    return example
