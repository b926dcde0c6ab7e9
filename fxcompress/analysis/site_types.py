"""What a weight site is: an op that consumes a parameter, found by dataflow."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import fx

from fxcompress.forms import WeightLayout


class SiteKind(enum.Enum):
    """How the parameter is consumed."""

    LINEAR = "linear"  # last dimension of the input contracted with K: linear, addmm, mm, matmul
    BATCHED = "batched"  # bmm, baddbmm, batched matmul: one matrix per batch entry
    EINSUM = "einsum"
    EXPERTS = "experts"  # grouped matmul over a 3-D parameter
    CONV = "conv"
    CONV_TRANSPOSED = "conv_transposed"
    EMBEDDING = "embedding"
    OTHER = "other"  # a matrix parameter consumed in a way only a dense weight serves


@dataclass(frozen=True, eq=False)
class Site:
    """One use of a weight.

    Args:
        name: Canonical qualified name of the parameter.
        kind: How it is consumed.
        node: The consuming op.
        weight: The placeholder bound to the parameter.
        weight_value: The node that ``node`` actually takes (after t/transpose/to/…); equals ``weight`` if
            none.
        chain: Nodes from the placeholder (exclusive) to ``weight_value`` (inclusive).
        layout: The parameter as ``[B, N, K]`` *for this use*.
        input: The activation node contracted with K (indices for an embedding); None when unknown.
        bias: Canonical name of the bias parameter, or None.
        bias_node: Node of the bias as the op takes it, or None.
        reason: For OTHER: why only a dense weight serves.
    """

    name: str
    kind: SiteKind
    node: fx.Node
    weight: fx.Node
    weight_value: fx.Node
    chain: tuple[fx.Node, ...]
    layout: WeightLayout
    input: fx.Node | None
    bias: str | None = None
    bias_node: fx.Node | None = None
    reason: str = ""

    @property
    def takes_activation(self) -> bool:
        """Whether the site multiplies activations with the weight (so that they can be quantized)."""
        return self.kind not in (SiteKind.EMBEDDING, SiteKind.OTHER) and self.input is not None
