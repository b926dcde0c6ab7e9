"""Decoders with a cache: what is captured, how inputs and outputs are called, and the files generators read.

Names follow the convention of the ONNX ecosystem: ``past_key_values.N.key`` and ``.value`` ``[batch, heads,
past_sequence, head_size]`` go in, ``present.N.key`` and ``.value`` with the new tokens appended come out.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.backends.onnx.export import Signature
from fxcompress.capture import capture_model
from fxcompress.capture.program import Program
from fxcompress.errors import BackendError

__all__ = ["CachedDecoder", "write_generation_files"]

_PAST, _TOKENS = 5, 3  # of the example: sizes that no dimension of a model is likely to have
_FIX = "export it with cache=False."


class _CachedCall(nn.Module):
    """A decoder called with the tensors of its cache; returns logits and the grown tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> list[Tensor]:
        cache = empty_cache(self.model)
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values = past_key_values[2 * index : 2 * index + 2]
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.is_initialized = True
        given = {"position_ids": position_ids} if "position_ids" in parameters_of(self.model) else {}
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **given,
        )
        grown = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return [result.logits, *grown]


def empty_cache(model: Any) -> Any:
    """An empty cache whose layers hold keys and values and nothing else.

    Raises:
        BackendError: the model keeps another kind of cache.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    plain: Any = DynamicCache().layer_class_to_replicate
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False) or set(vars(layer)) != set(vars(plain())):
            raise BackendError(
                f"layer {index} keeps its state in a {type(layer).__name__}, not in growing keys and values.",
                fix=_FIX,
            )
    return cache


@dataclasses.dataclass(frozen=True)
class CachedDecoder:
    """A decoder captured with its cache.

    Args:
        program: The graph, weights under the model's own names.
        example: Its flat inputs.
        signature: The names.
        past_shapes: ``(heads, head size)`` of every layer.
    """

    program: Program
    example: list[Any]
    signature: Signature
    past_shapes: tuple[tuple[int, int], ...]

    @classmethod
    def capture(cls, model: Any, ids: Tensor) -> CachedDecoder:
        """Capture ``model`` with a cache.

        Args:
            model: A decoder of transformers that can generate.
            ids: ``[B, T]`` tokens to make the example of; B ≥ 2.

        Raises:
            BackendError: it is no such decoder, or its cache is not plain keys and values.
        """
        _check_decoder(model)
        shapes = _past_shapes(model, ids)
        kwargs = cached_inputs(ids, shapes, dtype=model.dtype)
        program = _without_prefix(capture_model(_CachedCall(model), (), kwargs))
        flat = [*(kwargs[name] for name in ("input_ids", "attention_mask", "position_ids"))]
        flat += kwargs["past_key_values"]
        names = ["input_ids", "attention_mask", "position_ids"]
        names += [f"past_key_values.{i}.{part}" for i in range(len(shapes)) for part in ("key", "value")]
        present = [f"present.{i}.{part}" for i in range(len(shapes)) for part in ("key", "value")]
        past = ("batch", "", "past_sequence", "")
        dimensions: dict[str, Sequence[str]] = dict.fromkeys(names[3:], past)
        dimensions["input_ids"] = dimensions["position_ids"] = ("batch", "sequence")
        dimensions["attention_mask"] = ("batch", "total_sequence")
        signature = Signature(dict(zip(program.inputs, names, strict=True)), ["logits", *present], dimensions)
        return cls(program, flat, signature, tuple(shapes))

    def trials(
        self,
        run: Callable[[list[Any]], Sequence[Tensor]],
        *,
        one_by_one: bool,
        prompts: Sequence[Tensor] = (),
    ) -> list[tuple[str, list[Any]]]:
        """Calls of the kinds that a generator makes, padding included; caches hold what the model wrote.

        Args:
            run: The reference: flat inputs to outputs.
            one_by_one: Prompts that continue others come one sequence at a time.
            prompts: Further token ids ``[B, T]`` to read from the beginning.
        """
        ids, rows = self.example[0], 1 if one_by_one else self.example[0].shape[0]
        last = ids.shape[1] - 1
        calls = [
            ("one example input" if one_by_one else "example inputs", ids[:rows], min(_PAST, last), 0),
            ("prompt", ids, 0, 0),
            ("decode step", ids[:, : min(8, last + 1)], min(7, last), 0),
            ("padded decode step", ids[:, : min(8, last + 1)], min(7, last), min(2, last - 1)),
        ]
        calls += [(f"calibration inputs {index}", ids, 0, 0) for index, ids in enumerate(prompts)]
        return [(name, self._call(run, *call)) for name, *call in calls]

    def _call(
        self, run: Callable[[list[Any]], Sequence[Tensor]], ids: Tensor, past: int, padding: int
    ) -> list[Any]:
        """A call with the tokens from ``past`` on, after a call with those before."""
        dtype = self.example[3].dtype
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = [ids.new_zeros(ids.shape[0], *shape, dtype=dtype) for shape in self._empty_shapes()]
        if past:
            cache = list(run([ids[:, :past], mask[:, :past], positions[:, :past], *cache])[1:])
        return [ids[:, past:], mask, positions[:, past:], *cache]

    def _empty_shapes(self) -> list[tuple[int, int, int]]:
        return [(heads, 0, size) for heads, size in self.past_shapes for _ in range(2)]


def cached_inputs(
    ids: Tensor,
    shapes: Sequence[tuple[int, int]],
    *,
    past: int = _PAST,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """One call with random keys and values of ``past`` tokens, to capture a model with."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens = ids.shape
    mask = torch.ones(batch, past + tokens, dtype=torch.int64)
    positions = (mask.cumsum(-1) - 1)[:, past:]
    cache = [
        torch.randn(batch, heads, past, size, generator=generator).to(dtype) * 0.5
        for heads, size in shapes
        for _ in range(2)
    ]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
    }


def parameters_of(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of a model's forward."""
    return frozenset(inspect.signature(model.forward).parameters)


def _check_decoder(model: Any) -> None:
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "can_generate", lambda: False)():
        raise BackendError(
            f"{type(model).__name__} does not generate text, so it has no cache to export.", fix=_FIX
        )
    if getattr(config, "is_encoder_decoder", False):
        raise BackendError(
            f"{type(model).__name__} is an encoder–decoder, whose cache is not exported in this version.",
            fix=_FIX,
        )
    missing = {"input_ids", "attention_mask", "past_key_values", "use_cache"} - parameters_of(model)
    if missing:
        raise BackendError(
            f"{type(model).__name__} takes no {', '.join(sorted(missing))}: it keeps another kind of cache.",
            fix=_FIX,
        )


class _Keys(nn.Module):
    """A decoder's keys after a prompt."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> list[Tensor]:
        cache = empty_cache(self.model)
        self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return [layer.keys for layer in cache.layers]


def _past_shapes(model: Any, ids: Tensor) -> list[tuple[int, int]]:
    """Heads and head size of every layer's keys, observed: models disagree on where they are configured."""
    program = capture_model(_Keys(model), (), {"input_ids": ids})
    (results,) = program.graph.output_node().args
    keys = [node.meta["val"] for node in results]  # type: ignore[union-attr]
    return [(int(key.shape[1]), int(key.shape[3])) for key in keys]


def _without_prefix(program: Program) -> Program:
    """Weights under the names that they have in the model inside the wrapper."""

    def bare(name: str) -> str:
        return name.removeprefix("model.")

    return dataclasses.replace(
        program,
        weight_of={key: bare(name) for key, name in program.weight_of.items()},
        weights={bare(name): value for name, value in program.weights.items()},
        parameters=frozenset(map(bare, program.parameters)),
        aliases={bare(key): bare(name) for key, name in program.aliases.items()},
    )


def write_generation_files(
    model: Any, tokenizer: Any, folder: Path, filename: str, decoder: CachedDecoder
) -> None:
    """Write what generators read beside the model: configurations and the tokenizer's files."""
    model.config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    content = json.dumps(_genai_config(model, filename, decoder), indent=1, sort_keys=True)
    (folder / "genai_config.json").write_text(content + "\n", encoding="utf-8")


def _genai_config(model: Any, filename: str, decoder: CachedDecoder) -> dict[str, Any]:
    """The configuration of onnxruntime-genai, read off the graph and the model's configuration."""
    config = model.config.get_text_config()
    generation = getattr(model, "generation_config", None)

    def token(name: str) -> Any:
        value = getattr(generation, name, None)
        return value if value is not None else getattr(config, name, None)

    end = token("eos_token_id")
    first_end = end[0] if isinstance(end, list) else end
    padding = token("pad_token_id")
    heads, size = decoder.past_shapes[0]
    context = int(getattr(config, "max_position_embeddings", None) or 2048)
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": token("bos_token_id") if token("bos_token_id") is not None else first_end,
            "eos_token_id": end,
            "pad_token_id": first_end if padding is None else padding,
            "context_length": context,
            "vocab_size": int(config.vocab_size),
            "decoder": {
                "filename": filename,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": size,
                "hidden_size": int(config.hidden_size),
                "num_attention_heads": int(getattr(config, "num_attention_heads", heads)),
                "num_key_value_heads": heads,
                "num_hidden_layers": len(decoder.past_shapes),
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
