"""fxcompress: a graph-level model-compression compiler for PyTorch.

fast = torch.compile(model, backend="fxcompress")
small = fxcompress.compress(model, "w8a8-smooth", calibration="corpus.txt", tokenizer=tokenizer)
small.report.show(); small.save("out"); fxcompress.load("out").generate(**inputs)
"""

from fxcompress.api import compress, load
from fxcompress.edits import Edit
from fxcompress.errors import FxCompressError
from fxcompress.model import CompressedModel
from fxcompress.pass_base import Pass
from fxcompress.presets import recipes
from fxcompress.recipe import Recipe
from fxcompress.registry import register_pass
from fxcompress.report import Report
from fxcompress.training.distillation import distill

__version__ = "0.1.0"

__all__ = [
    "CompressedModel",
    "Edit",
    "FxCompressError",
    "Pass",
    "Recipe",
    "Report",
    "__version__",
    "compress",
    "distill",
    "load",
    "recipes",
    "register_pass",
]
