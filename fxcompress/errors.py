"""The exception tree. Every error a user can meet derives from :class:`FxCompressError`.

    FxCompressError
    ├── CaptureError         the model cannot be captured as a graph
    ├── RecipeError          unknown pass/preset/option, illegal order or combination
    ├── CalibrationError     missing, empty, malformed or non-finite calibration data
    ├── WeightError          non-finite, missing or unsuitable weights
    ├── FormatError          a number format that cannot represent what was asked
    ├── TrainingError        a training run that cannot start or go on (nothing to train, NaN)
    ├── CoverageError        a run that compressed nothing, or an unaccounted weight
    ├── VerificationError    a pass that broke the promise it made
    ├── ArtifactError        a saved result that is missing, damaged, too new or unsafe
    ├── BindingError         packed weights that do not belong to the parameters in use
    └── BackendError         an execution backend that cannot do what was explicitly asked

Messages follow one shape: *where* (parameter, pass, file), *what was found and expected*, *what to do*.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FxCompressError(Exception):
    """Base of all errors raised on purpose by fxcompress.

    Args:
        message: One sentence: where, and what was found/expected.
        fix: What the user can do about it; appended as ``Fix: …``.
    """

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.fix = fix
        super().__init__(f"{message} Fix: {fix}" if fix else message)


class CaptureError(FxCompressError):
    """The model could not be captured as a graph; the message names the user's source line."""


class RecipeError(FxCompressError):
    """A recipe is malformed: unknown name, wrong option, illegal order or combination."""


class CalibrationError(FxCompressError):
    """Calibration data are missing, empty, malformed, out of vocabulary or not finite."""


class WeightError(FxCompressError):
    """A weight is missing, not finite, on the wrong device or of an unsuitable shape."""


class FormatError(FxCompressError):
    """A number format cannot represent what was asked of it."""


class TrainingError(FxCompressError):
    """A training run cannot start or go on: nothing to train, models that do not fit, a loss that is NaN."""


class CoverageError(FxCompressError):
    """Nothing was compressed, or a weight was left without an account."""


class VerificationError(FxCompressError):
    """A pass broke its promise: a function-preserving pass changed the function."""


class ArtifactError(FxCompressError):
    """A saved result is missing, damaged, edited, too new or tries to leave its directory."""


class BindingError(FxCompressError):
    """The parameters passed at call time are not those the packed weights were made for."""


class BackendError(FxCompressError):
    """A backend cannot do what was explicitly asked of it."""


@contextmanager
def told_where(where: str) -> Iterator[None]:
    """Put ``where`` before the message of an error raised inside, unless it is there already."""
    try:
        yield
    except FxCompressError as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error
