"""Calibration data: anything a user may hand over becomes a list of checked batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.calibration.signature import CallSignature, fixed_sizes
from fxcompress.capture.program import Program
from fxcompress.errors import CalibrationError

__all__ = ["Batch", "CalibrationData", "as_calibration"]

SAMPLES = 32
SEQUENCE_LENGTH = 512
_UNLIMITED = 1 << 24  # tokenizers without a limit report absurd lengths


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the program.

    Args:
        inputs: Flat user inputs in the order of ``program.inputs``.
        tokens: How many tokens (or samples, for models without token ids) it holds.
        text: Whether every tensor is ``[batch, sequence]`` made here from text, so that it may be shortened.
    """

    inputs: tuple[Any, ...]
    tokens: int
    text: bool = False

    def shortened(self, rows: int, length: int) -> Batch:
        """At most ``rows`` sequences of ``length`` tokens; other batches than text are returned whole."""
        if not self.text:
            return self
        cut = tuple(value[:rows, :length] if isinstance(value, Tensor) else value for value in self.inputs)
        return Batch(cut, min(self.tokens, rows * length), True)


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Checked calibration batches.

    Args:
        batches: In the order in which they run.
        source: What they were made from, for reports.
    """

    batches: tuple[Batch, ...]
    source: str = "tensors"
    dynamic_length: bool = field(default=False)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def tokens(self) -> int:
        """Tokens in all batches together."""
        return sum(batch.tokens for batch in self.batches)

    def flat(self) -> list[tuple[Any, ...]]:
        """Flat user inputs per batch."""
        return [batch.inputs for batch in self.batches]

    def sample(self, batches: int, length: int = 128) -> CalibrationData:
        """A small part for checks: evenly spread batches, text cut to ``length`` tokens if sizes may vary."""
        count = min(batches, len(self.batches))
        chosen = [self.batches[i * len(self.batches) // count] for i in range(count)]
        if self.dynamic_length:
            chosen = [batch.shortened(1, length) for batch in chosen]
        return CalibrationData(tuple(chosen), self.source, self.dynamic_length)

    def fingerprint(self) -> str:
        """SHA-256 of all values; equal data give equal fingerprints."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for value in batch.inputs:
                digest.update(tensor_digest(value) if isinstance(value, Tensor) else repr(value).encode())
            digest.update(b";")
        return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    data = tensor.detach().cpu().contiguous()
    if data.numel():
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def as_calibration(
    data: Any,
    program: Program,
    *,
    tokenizer: Callable[..., Any] | None = None,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
) -> CalibrationData:
    """Turn calibration data of any kind into checked batches.

    Args:
        data: One of

            - the path of a UTF-8 text file: one stream of tokens, cut into sequences of
              ``sequence_length`` spread evenly over the file (needs ``tokenizer``);
            - a list of strings: one sequence each, cut at ``sequence_length`` (needs ``tokenizer``);
            - a tensor: the call's only tensor; when its first dimension is dynamic, one batch per row;
            - a mapping by argument name, or a tuple of positional arguments: one batch;
            - a list, a ``DataLoader`` or any iterable of such batches;
            - a callable without arguments that returns any of these.
        program: The captured program, which says what the inputs must be.
        tokenizer: Called as ``tokenizer(text, add_special_tokens=…)``, giving a mapping with ``input_ids``.
        samples: At most this many sequences (rows of the first tensor) are used. Default 32.
        sequence_length: Tokens per sequence. Default: the length the capture fixed, else 512, but never more
            than the tokenizer's ``model_max_length``.

    Raises:
        CalibrationError: no data, an unreadable file, text without a tokenizer, inputs of other names,
            kinds or shapes than captured, token ids outside of the vocabulary, NaN or inf.

    Example:
        >>> as_calibration("corpus.txt", program, tokenizer=tokenizer, samples=16, sequence_length=256)
    """
    if samples < 1:
        raise CalibrationError(f"calibration: samples={samples}, expected at least 1.")
    signature = CallSignature(program)
    reader = _Reader(signature, tokenizer, samples, sequence_length)
    if isinstance(data, CalibrationData):
        batches, source = list(data.batches), data.source
    else:
        batches, source = reader.read(data)
    if not batches:
        raise CalibrationError(f"calibration: the {source} gave no batch.", fix="give at least one sample.")
    for index, batch in enumerate(batches):
        signature.check(batch.inputs, f"calibration batch {index + 1}")
    return CalibrationData(tuple(batches), source, reader.dynamic_length)


class _Reader:
    def __init__(
        self, signature: CallSignature, tokenizer: Callable[..., Any] | None, samples: int, length: int | None
    ) -> None:
        self.signature = signature
        self.tokenizer = tokenizer
        self.samples = samples
        sizes = self._captured_sizes()
        fixed = sizes[1] if len(sizes) > 1 else None
        self.dynamic_length = fixed is None and not (sizes and isinstance(sizes[0], int))
        limit = getattr(tokenizer, "model_max_length", None)
        wanted = length or fixed or SEQUENCE_LENGTH
        self.length = min(wanted, limit) if isinstance(limit, int) and limit < _UNLIMITED else wanted
        if self.length < 1 or (fixed is not None and self.length != fixed):
            raise CalibrationError(
                f"calibration: sequences of {self.length} tokens, but the model was captured with {fixed}.",
                fix=f"use sequence_length={fixed}.",
            )

    def _captured_sizes(self) -> list[int | None]:
        """Captured sizes of the first token-id input; None where dynamic."""
        for name in self.signature.vocabularies:
            return fixed_sizes(self.signature.nodes[name].meta["val"])
        return []

    def read(self, data: Any) -> tuple[list[Batch], str]:
        if data is None:
            raise CalibrationError("calibration: there are no data.", fix="pass calibration=….")
        if isinstance(data, str | os.PathLike):
            return self._from_file(Path(data)), f"text file {Path(data).name}"
        if isinstance(data, Tensor):
            return list(self._limit(self._rows(data))), "tensor"
        if isinstance(data, Mapping | tuple):
            return [self._batch(data, 0)], "batch"
        if callable(data) and not isinstance(data, Iterable):
            return self.read(data())
        if isinstance(data, Iterable):
            return self._from_iterable(data)
        raise CalibrationError(
            f"calibration: found a {type(data).__name__}.",
            fix="give a text file, strings, tensors, dicts, a DataLoader or a callable.",
        )

    def _from_iterable(self, data: Iterable[Any]) -> tuple[list[Batch], str]:
        iterator = iter(data)
        try:
            first = next(iterator)
        except StopIteration:
            return [], type(data).__name__

        def everything() -> Iterator[Any]:
            yield first
            yield from iterator

        if isinstance(first, str):
            return list(self._limit(self._from_texts(everything()))), "list of texts"
        made = (self._batch(item, index) for index, item in enumerate(everything()))
        return list(self._limit(made)), type(data).__name__

    def _limit(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Stop once ``samples`` rows were given; the iterable may be endless."""
        rows = 0
        for batch in batches:
            yield batch
            first = next((value for value in batch.inputs if isinstance(value, Tensor)), None)
            rows += int(first.shape[0]) if first is not None and first.dim() else 1
            if rows >= self.samples:
                return

    def _batch(self, item: Any, index: int, *, text: bool = False) -> Batch:
        flat = self.signature.flatten(item, f"calibration batch {index + 1}")
        ids = [
            v
            for name, v in zip(self.signature.nodes, flat, strict=True)
            if name in self.signature.vocabularies
        ]
        tensors = [value for value in flat if isinstance(value, Tensor)]
        if ids and isinstance(ids[0], Tensor):
            tokens = ids[0].numel()
        else:
            tokens = int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1
        return Batch(tuple(flat), tokens, text)

    def _rows(self, data: Tensor) -> Iterator[Batch]:
        names = self.signature.tensor_names
        example = self.signature.example(names[0]) if len(names) == 1 else None
        dynamic = isinstance(example, Tensor) and example.dim() > 0 and fixed_sizes(example)[0] is None
        parts = data.split(1) if dynamic and data.dim() > 0 and data.shape[0] else [data]
        for index, part in enumerate(parts):
            yield self._batch(part, index)

    def _tokenizer(self) -> Callable[..., Any]:
        if self.tokenizer is None:
            raise CalibrationError(
                "calibration: text was given without a tokenizer.", fix="pass tokenizer=…."
            )
        return self.tokenizer

    def _ids(self, text: str, special: bool) -> list[int]:
        found = self._tokenizer()(text, add_special_tokens=special)["input_ids"]
        ids = found.reshape(-1).tolist() if isinstance(found, Tensor) else list(found)
        if ids and isinstance(ids[0], Sequence):  # some tokenizers always return a batch
            ids = list(ids[0])
        return [int(i) for i in ids]

    def _special(self) -> tuple[list[int], list[int]]:
        """Tokens the tokenizer puts before and after a text, such as a begin or separator mark."""
        plain, full = self._ids("a", False), self._ids("a", True)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _from_file(self, path: Path) -> list[Batch]:
        if not path.is_file():
            raise CalibrationError(
                f"calibration: {os.fspath(path)[:200]!r} is no file.",
                fix="give a text file, or texts as a list.",
            )
        self._tokenizer()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"calibration: {path} cannot be read as UTF-8 text: {error}.") from error
        before, after = self._special()
        ids = self._ids(text, False)
        room = self.length - len(before) - len(after)
        if room < 1:
            raise CalibrationError(f"calibration: sequences of {self.length} tokens have no room for text.")
        windows = [ids[start : start + room] for start in range(0, len(ids), room)]
        if len(windows) > 1 and len(windows[-1]) < room:
            windows.pop()
        count = min(self.samples, len(windows))
        chosen = [windows[i * len(windows) // count] for i in range(count)]
        return [self._sequence([*before, *window, *after], index) for index, window in enumerate(chosen)]

    def _from_texts(self, texts: Iterable[Any]) -> Iterator[Batch]:
        before, after = self._special()
        room = self.length - len(before) - len(after)
        index = 0
        for text in texts:
            if not isinstance(text, str):
                raise CalibrationError(
                    f"calibration: a {type(text).__name__} among the texts, expected strings."
                )
            ids = self._ids(text, False)[:room]
            if ids:
                yield self._sequence([*before, *ids, *after], index)
                index += 1

    def _sequence(self, ids: list[int], index: int) -> Batch:
        """A batch of one sequence; masks and segment ids are made when the captured call takes them."""
        signature = self.signature
        targets = [name for name in signature.names if self._is_ids(name)]
        if not targets:
            raise CalibrationError(
                "calibration: text was given, but no input of the captured call is token ids.",
                fix="give tensors of the kind in example_inputs.",
            )
        sizes = self._captured_sizes()
        rows = sizes[0] if sizes and sizes[0] is not None else 1  # a fixed batch size is filled with copies
        token_ids = torch.tensor([ids] * rows)
        made: dict[str, Tensor] = {targets[0]: token_ids}
        for name in signature.tensor_names:
            if name == "attention_mask":
                example = signature.example(name)
                made[name] = torch.ones_like(token_ids, dtype=example.dtype)
            elif name == "token_type_ids":
                made[name] = torch.zeros_like(token_ids)
            elif name == "position_ids":
                made[name] = torch.arange(len(ids)).expand(rows, -1).contiguous()
        return self._batch(made, index, text=True)

    def _is_ids(self, name: str) -> bool:
        if name in ("attention_mask", "token_type_ids", "position_ids") or self.signature.is_constant(name):
            return False
        return name == "input_ids" or self.signature.placeholder(name) in self.signature.vocabularies
