"""Custom operators ``fxcompress::*`` and their reference implementations.

Each operator is registered as a composite: it stays one node in a pre-dispatch graph, where a backend may
replace it by a kernel, and decomposes into ordinary tensor operations wherever no backend replaced it. So
every graph made here runs on every device and under every compiler that PyTorch supports. Importing this
package registers the operators and does nothing else.
"""

from fxcompress.ops.activation import apply_quantizer, apply_transforms
from fxcompress.ops.weight import dequantize_weight

# Imported for their registration.
from fxcompress.ops import cache, codebook, embedding, floating, outliers  # noqa: F401  isort: skip
from fxcompress.ops import sliding_cache, sparse, straight_through  # noqa: F401  isort: skip

__all__ = ["apply_quantizer", "apply_transforms", "dequantize_weight"]
