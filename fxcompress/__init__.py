"""fxcompress: a graph-level model-compression compiler for PyTorch.

fast = torch.compile(model, backend="fxcompress")
small = fxcompress.compress(model, "w8a8-smooth", calibration="corpus.txt", tokenizer=tokenizer)
small.report.show(); small.save("out"); fxcompress.load("out").generate(**inputs)
"""

from typing import TYPE_CHECKING, Any

from fxcompress.api import compress, load
from fxcompress.edits import Edit
from fxcompress.errors import FxCompressError
from fxcompress.explanation import Explanation, explain
from fxcompress.exported import compress_exported
from fxcompress.model import CompressedModel
from fxcompress.pass_base import Pass
from fxcompress.presets import recipes
from fxcompress.recipe import Recipe
from fxcompress.registry import register_pass
from fxcompress.report import Report

__version__ = "0.1.0"

__all__ = [
    "CompressedModel",
    "Edit",
    "Explanation",
    "FxCompressError",
    "Pass",
    "Recipe",
    "Report",
    "__version__",
    "compress",
    "compress_exported",
    "distill",
    "explain",
    "load",
    "recipes",
    "register_pass",
]

if TYPE_CHECKING:
    from fxcompress.training.distillation import distill


def __getattr__(name: str) -> Any:
    """Import what trains when it is asked for: it loads torch's distributed parts."""
    if name == "distill":
        from fxcompress.training.distillation import distill

        return distill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
