"""What is learned from: checked sequences, one row each, batched alike however many processes there are."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxcompress.calibration.generated import generated_tokens
from fxcompress.calibration.inputs import CalibrationData, as_calibration, tensor_digest
from fxcompress.calibration.signature import CallSignature
from fxcompress.capture.program import Program
from fxcompress.errors import CalibrationError, TrainingError
from fxcompress.training.objective import Sequences

__all__ = ["DatasetBuilder", "SelfGenerated", "TrainingData", "as_training", "causal_shift"]

IGNORED = -100


class DatasetBuilder(Protocol):
    """Makes the data of a run: stands before the loop, which only sees what it returns.

    Pipelines that ask a teacher for text, reasons or answers are builders.
    """

    def __call__(self, teacher: Any, tokenizer: Any) -> Any:
        """Anything :func:`as_training` reads. ``teacher`` is what the caller gave as teacher."""
        ...


@dataclass(frozen=True)
class SelfGenerated:
    """Text that a language model draws from itself: first token at random, a few greedy, then sampled.

    Args:
        samples: Sequences. Default 64.
        length: Tokens per sequence. Default 256.
        seed: Of the sampling.

    Source: Liu et al., 2023, arXiv:2305.17888.
    """

    samples: int = 64
    length: int = 256
    seed: int = 0

    def __call__(self, teacher: Any, tokenizer: Any) -> list[Tensor]:
        """The sequences, ``[1, length]`` each."""
        module = getattr(teacher, "model", teacher)
        if not isinstance(module, nn.Module) or not hasattr(teacher, "generate"):
            raise TrainingError(
                "the teacher cannot generate text to learn from.", fix="pass data=…, e.g. a text file."
            )
        return generated_tokens(teacher, samples=self.samples, length=self.length, seed=self.seed)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Rows of one data set.

    Args:
        rows: Per row the captured inputs by placeholder name, first dimension 1.
        labels: Per row ``[1, T]`` labels, or None to take the tokens themselves.
        ids: Placeholder of the token ids, or None.
        mask: Placeholder of an attention mask, or None.
        source: For reports.
    """

    rows: tuple[Mapping[str, Any], ...]
    labels: tuple[Tensor | None, ...]
    ids: str | None
    mask: str | None
    source: str = "data"

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 of all values."""
        digest = hashlib.sha256()
        for row, labels in zip(self.rows, self.labels, strict=True):
            for value in (*row.values(), labels):
                digest.update(tensor_digest(value) if isinstance(value, Tensor) else repr(value).encode())
        return digest.hexdigest()

    def split(self, share: float) -> tuple[TrainingData, TrainingData]:
        """``(the rest, held out)``: every n-th row is held out, at least one and not all.

        Raises:
            CalibrationError: there are fewer than two rows.
        """
        if len(self) < 2:
            raise CalibrationError(
                f"held-out data: a share of {len(self)} sequences cannot be held out.",
                fix="give more sequences, or held-out data of their own.",
            )
        count = min(len(self) - 1, max(1, round(share * len(self))))
        held = {i * len(self) // count for i in range(count)}
        return self.take([i for i in range(len(self)) if i not in held]), self.take(sorted(held))

    def take(self, rows: Sequence[int]) -> TrainingData:
        """Some rows."""
        return TrainingData(
            tuple(self.rows[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            self.ids,
            self.mask,
            self.source,
        )

    def batch(self, rows: Sequence[int], device: torch.device | None = None) -> Sequences:
        """Rows side by side, shorter sequences filled up at the end; what was filled up is not learned."""
        length = max((self._length(i) for i in rows), default=0)
        inputs: dict[str, Any] = {}
        for name, example in self.rows[rows[0]].items():
            if isinstance(example, Tensor):
                parts = [_filled(self.rows[i][name], length, self._length(i)) for i in rows]
                inputs[name] = torch.cat(parts).to(device)
            else:
                inputs[name] = example
        return Sequences(inputs, self.ids, self._labels(rows, inputs, length), tuple(rows))

    def _length(self, row: int) -> int:
        return int(self.rows[row][self.ids].shape[1]) if self.ids is not None else 0

    def _labels(self, rows: Sequence[int], inputs: Mapping[str, Any], length: int) -> Tensor | None:
        given = [self.labels[i] for i in rows]
        if self.ids is None:
            return (
                torch.cat([g for g in given if g is not None]) if all(g is not None for g in given) else None
            )
        labels = []
        for i, own in zip(rows, given, strict=True):
            tokens: Tensor = self.rows[i][self.ids]
            own = tokens if own is None else own
            if self.mask is not None:
                own = own.masked_fill(self.rows[i][self.mask] == 0, IGNORED)
            labels.append(torch.nn.functional.pad(own, (0, length - own.shape[1]), value=IGNORED))
        stacked: Tensor = torch.cat(labels).to(inputs[self.ids].device)
        return stacked


def _filled(value: Tensor, length: int, own: int) -> Tensor:
    """``[1, own]`` filled with zeros to ``[1, length]``; other tensors are left as they are."""
    if own == length or value.dim() != 2 or value.shape[1] != own:
        return value
    return torch.nn.functional.pad(value, (0, length - own))


def as_training(
    data: Any,
    program: Program,
    *,
    tokenizer: Any = None,
    teacher: Any = None,
    samples: int = 1024,
    sequence_length: int | None = None,
    longest: int | None = None,
) -> TrainingData:
    """Turn training data of any kind into checked rows.

    Args:
        data: What :func:`fxcompress.calibration.as_calibration` reads; a :class:`DatasetBuilder`; or mappings
            with ``labels`` beside the inputs (``[B, T]``, -100 where not learned).
        program: The captured model.
        tokenizer: For text.
        teacher: Handed to a builder.
        samples: At most this many sequences.
        sequence_length: Tokens per sequence of a text.
        longest: Tokens that the model can take; longer sequences are an error.

    Raises:
        CalibrationError: no data, or they do not fit the model.
        TrainingError: sequences longer than the model allows.
    """
    if isinstance(data, TrainingData):
        return data
    if callable(data) and not isinstance(data, CalibrationData | Iterable | type):
        data = data(teacher, tokenizer) if _wants_teacher(data) else data()
    if sequence_length is not None and longest is not None and sequence_length > longest:
        raise _too_long(sequence_length, longest)
    labels: list[Tensor | None] = []
    read = as_calibration(
        _without_labels(data, labels),
        program,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=sequence_length,
    )
    signature = CallSignature(program)
    ids = next(iter(signature.vocabularies), None)
    rows: list[dict[str, Any]] = []
    row_labels: list[Tensor | None] = []
    for index, batch in enumerate(read.batches):
        named = dict(zip(program.inputs, batch.inputs, strict=True))
        own = labels[index] if index < len(labels) else None
        for row, part in _split(named, own):
            rows.append(row)
            row_labels.append(part)
    if not rows:
        raise CalibrationError("training: there are no sequences.", fix="give at least one.")
    if ids is not None and longest is not None:
        found = max(int(row[ids].shape[1]) for row in rows)
        if found > longest:
            raise _too_long(found, longest)
    mask = next((n for n in program.inputs if n == signature.placeholder("attention_mask")), None)
    if mask is not None and not _is_plain_mask(rows, mask, ids):
        mask = None
    return TrainingData(tuple(rows), tuple(row_labels), ids, mask, read.source)


def _too_long(found: int, longest: int) -> TrainingError:
    return TrainingError(
        f"training: a sequence of {found} tokens, the model takes at most {longest}.",
        fix=f"cut the data, or use sequence_length={longest}.",
    )


def _wants_teacher(data: Callable[..., Any]) -> bool:
    """Whether a callable is a builder (two arguments) rather than one that just returns data."""
    try:
        parameters = inspect.signature(data).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters) >= 2


def _without_labels(data: Any, labels: list[Tensor | None]) -> Any:
    """The data with ``labels`` taken out of mappings, in order."""
    if isinstance(data, Mapping):
        return _without(data, labels)
    if isinstance(data, str | CalibrationData | Tensor | tuple) or not isinstance(data, Iterable):
        return data

    def stripped(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield _without(item, labels) if isinstance(item, Mapping) else item

    return stripped(data)


def _without(item: Mapping[str, Any], labels: list[Tensor | None]) -> dict[str, Any]:
    given = dict(item)
    own = given.pop("labels", None)
    labels.append(own)
    return given


def _split(named: Mapping[str, Any], labels: Tensor | None) -> Iterator[tuple[dict[str, Any], Tensor | None]]:
    """Single rows of a batch; a batch whose tensors do not share their first dimension stays whole."""
    sizes = {v.shape[0] if v.dim() else -1 for v in named.values() if isinstance(v, Tensor)}
    if len(sizes) != 1 or -1 in sizes:
        yield dict(named), labels
        return
    (count,) = sizes
    for i in range(count):
        row = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in named.items()}
        yield row, None if labels is None else labels[i : i + 1]


def _is_plain_mask(rows: Sequence[Mapping[str, Any]], mask: str, ids: str | None) -> bool:
    return ids is not None and all(
        isinstance(row[mask], Tensor) and row[mask].shape == row[ids].shape for row in rows
    )


def causal_shift(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and the labels that follow: ``[B, T-1, V]`` and ``[B, T-1]``."""
    return scores[:, :-1], labels[:, 1:]
