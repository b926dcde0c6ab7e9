"""What compression cost: perplexity, agreement with a reference model, cosine similarity of encoders.

Everything takes a *callable*: a Hugging Face model, a plain module, a compiled or a compressed model. Token
ids go to the parameter ``input_ids`` where there is one, else to the first parameter.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import CalibrationError
from fxcompress.progress import ProgressEvent, ProgressOption, Reporter

__all__ = [
    "Agreement",
    "Perplexity",
    "Similarity",
    "agreement",
    "call_model",
    "main_tensor",
    "parameter_names",
    "perplexity",
    "similarity",
    "text_windows",
]

WINDOW = 512  # tokens; perplexities of other window lengths are not comparable
_POSITIONS = 128  # positions compared at once, which bounds the float32 copies of large vocabularies


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token.

    Args:
        perplexity: The value; inf when a token was impossible, nan when the model gave NaN.
        loss: Mean negative log-likelihood in nats.
        window: Tokens per window; each is seen without the text before it, and all but its first token are
            predicted.
        windows: Number of windows.
        tokens: Number of predicted tokens.
    """

    perplexity: float
    loss: float
    window: int
    windows: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data; values that JSON lacks become None."""
        return _plain(self)


@dataclass(frozen=True)
class Agreement:
    """How closely a model follows a reference on the same windows.

    Args:
        kl: Mean KL(reference ‖ model) per position, in nats.
        kl_max: Largest of them.
        top1: Share of positions at which both prefer the same token.
        window: Tokens per window.
        windows: Number of windows.
    """

    kl: float
    kl_max: float
    top1: float
    window: int
    windows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data; values that JSON lacks become None."""
        return _plain(self)


@dataclass(frozen=True)
class Similarity:
    """Cosine similarity of a model's outputs with a reference's, along the last dimension.

    Args:
        mean: Mean over all vectors.
        worst: Smallest.
        vectors: How many were compared.
    """

    mean: float
    worst: float
    vectors: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data; values that JSON lacks become None."""
        return _plain(self)


def text_windows(
    text: str, tokenizer: Callable[..., Any], *, length: int = WINDOW, windows: int | None = None
) -> Tensor:
    """Cut a text into windows that do not overlap.

    Args:
        text: The text; no special tokens are added.
        tokenizer: Called as ``tokenizer(text, add_special_tokens=False)``; gives ``input_ids`` in a mapping.
        length: Tokens per window. Default 512.
        windows: Keep this many, spread evenly over the text. Default: all; the rest at the end is dropped.

    Returns:
        ``[windows, length]`` int64.

    Raises:
        CalibrationError: the text is shorter than one window, or holds fewer windows than asked for.
    """
    if length < 2:
        raise CalibrationError(
            f"evaluation: windows of {length} tokens predict nothing.", fix="use at least 2."
        )
    ids = torch.as_tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64).reshape(
        -1
    )
    count = ids.numel() // length
    wanted = count if windows is None else windows
    if not 1 <= wanted <= count:
        raise CalibrationError(
            f"evaluation: the text has {ids.numel()} tokens, {max(wanted, 1)} windows of {length} need"
            f" {max(wanted, 1) * length}.",
            fix="give a longer text, or fewer or shorter windows.",
        )
    chosen = torch.tensor([i * count // wanted for i in range(wanted)])
    return ids[: count * length].reshape(count, length)[chosen]


@torch.no_grad()
def perplexity(
    model: Callable[..., Any], windows: Tensor, *, batch: int = 1, progress: ProgressOption = False
) -> Perplexity:
    """Perplexity of a causal language model over independent windows.

    Args:
        model: Gives logits ``[B, T, V]``.
        windows: ``[W, T]`` token ids, as from :func:`text_windows`.
        batch: Windows per call. Default 1.
        progress: True for a bar on stderr, or a callable that gets every step.

    Raises:
        CalibrationError: ``windows`` are no token ids, or the model's output is no ``[B, T, V]``.

    Example:
        >>> perplexity(model, text_windows(text, tokenizer)).perplexity  # doctest: +SKIP
        29.07
    """
    total, count = 0.0, 0
    for ids in _batches(windows, batch, "perplexity", progress):
        logits = _logits(model, ids)
        for start in range(0, ids.shape[1] - 1, _POSITIONS):
            stop = min(start + _POSITIONS, ids.shape[1] - 1)
            targets = ids[:, start + 1 : stop + 1]
            part = logits[:, start:stop].float().flatten(0, 1)
            total += float(F.cross_entropy(part, targets.flatten(), reduction="sum").double())
            count += targets.numel()
    loss = total / count
    value = math.exp(loss) if loss < 700 else (math.inf if loss == loss else math.nan)
    return Perplexity(value, loss, windows.shape[1], windows.shape[0], count)


@torch.no_grad()
def agreement(
    model: Callable[..., Any],
    reference: Callable[..., Any],
    windows: Tensor,
    *,
    batch: int = 1,
    progress: ProgressOption = False,
) -> Agreement:
    """KL divergence and top-1 agreement of ``model`` with ``reference`` at every position of every window.

    Args:
        model: Gives logits ``[B, T, V]``.
        reference: The same, over the same vocabulary.
        windows: ``[W, T]`` token ids.
        batch: Windows per call. Default 1.
        progress: True for a bar on stderr, or a callable that gets every step.

    Raises:
        CalibrationError: ``windows`` are no token ids, or the logits of the two have different shapes.
    """
    total, largest, same, count = 0.0, 0.0, 0, 0
    for ids in _batches(windows, batch, "agreement", progress):
        expected, found = _logits(reference, ids), _logits(model, ids)
        if expected.shape != found.shape:
            raise CalibrationError(
                f"evaluation: logits of shapes {tuple(found.shape)} and {tuple(expected.shape)} (reference).",
                fix="compare models of one vocabulary.",
            )
        for start in range(0, ids.shape[1], _POSITIONS):
            p = F.log_softmax(expected[:, start : start + _POSITIONS].float(), dim=-1)
            q = F.log_softmax(found[:, start : start + _POSITIONS].float(), dim=-1)
            kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # [B, positions]
            total += float(kl.double().sum())
            largest = max(largest, float(kl.max())) if bool(torch.isfinite(kl).all()) else math.nan
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += kl.numel()
    return Agreement(total / count, largest, same / count, windows.shape[1], windows.shape[0])


@torch.no_grad()
def similarity(model: Callable[..., Any], reference: Callable[..., Any], inputs: Iterable[Any]) -> Similarity:
    """Cosine similarity between the outputs of an encoder and its reference.

    Compared is the last hidden state where the output has one, else its first tensor. Positions masked by an
    ``attention_mask`` of the inputs are left out.

    Args:
        model: The encoder.
        reference: The same before compression.
        inputs: One item per call: a mapping of keyword arguments, a tuple of arguments, or a tensor.

    Raises:
        CalibrationError: no inputs, or outputs of different shapes.
    """
    worst, total, count = math.inf, 0.0, 0
    for item in inputs:
        expected, found = main_tensor(call_model(reference, item)), main_tensor(call_model(model, item))
        if expected.shape != found.shape:
            raise CalibrationError(
                f"evaluation: outputs of shapes {tuple(found.shape)} and {tuple(expected.shape)} (reference)."
            )
        cosine = F.cosine_similarity(found.double(), expected.double(), dim=-1)
        mask = item.get("attention_mask") if isinstance(item, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == cosine.shape:
            cosine = cosine[mask.bool()]
        total, count = total + float(cosine.sum()), count + cosine.numel()
        worst = min(worst, float(cosine.min()))
    if not count:
        raise CalibrationError("evaluation: there are no inputs to compare on.", fix="give at least one.")
    return Similarity(total / count, worst, count)


def call_model(model: Callable[..., Any], item: Any, **options: Any) -> Any:
    """Call ``model`` on one item: keyword mapping, argument tuple, or one tensor (token ids or other).

    Options that the model's signature does not name are left out.
    """
    names = parameter_names(model)
    kept = {key: value for key, value in options.items() if key in names}
    if isinstance(item, Mapping):
        return model(**item, **kept)
    if isinstance(item, Sequence):
        return model(*item, **kept)
    if "input_ids" in names and not item.is_floating_point():
        return model(input_ids=item, **kept)
    return model(item, **kept)


def parameter_names(model: Callable[..., Any]) -> frozenset[str]:
    """Parameters of the innermost function that names any; wrappers often take ``*args, **kwargs``."""
    candidates: list[Any] = [model.forward if isinstance(model, nn.Module) else model]
    for attribute in ("model", "_orig_mod", "module"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            candidates.append(inner.forward)
    for candidate in candidates:
        try:
            parameters = inspect.signature(candidate).parameters.values()
        except (TypeError, ValueError):
            continue
        names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if names:
            return frozenset(names)
    return frozenset()


def _batches(windows: Tensor, batch: int, stage: str, progress: ProgressOption) -> Iterator[Tensor]:
    if windows.ndim != 2 or windows.is_floating_point() or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise CalibrationError(
            f"evaluation: windows are {tuple(windows.shape)} {windows.dtype}, expected [W, T ≥ 2] token ids."
        )
    parts = windows.split(batch)
    with Reporter(progress) as reporter:
        reporter.start(stage, len(parts))
        for index, part in enumerate(parts, 1):
            yield part
            reporter.step(ProgressEvent(stage, f"window {index * batch}", index, len(parts)))


def _logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    output = call_model(model, ids, use_cache=False)
    found = main_tensor(output, ("logits",))
    if found.ndim != 3 or found.shape[:2] != ids.shape:
        raise CalibrationError(
            f"evaluation: the model gave {tuple(found.shape)} for ids {tuple(ids.shape)}, not [B, T, V].",
            fix="pass a causal language model.",
        )
    return found


def main_tensor(output: Any, keys: Sequence[str] = ("last_hidden_state", "logits")) -> Tensor:
    """The output tensor that is compared; output objects of any library are read by attribute or key."""
    for key in keys:
        found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(found, Tensor):
            return found
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise CalibrationError(f"evaluation: the output of type {type(output).__name__} holds no tensor.")


def _plain(result: Any) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in dataclasses.asdict(result).items()
    }
