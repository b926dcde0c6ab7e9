"""Replace weights by two thin factors from their plain singular value decomposition.

    linear(x, w)  →  linear(linear(x, v), u)
    conv(x, w)    →  conv1x1(conv(x, v), u)

Eckart & Young, 1936: no other matrix of that rank is closer to the weight. It knows nothing of the
inputs, and language models lose much by it; ``svd-llm`` is the method of choice where calibration data
are at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxcompress.pass_base import BlockContext
from fxcompress.passes._low_rank import LowRankPass, Metric
from fxcompress.passes._selection import Candidate


@dataclass(frozen=True)
class Svd(LowRankPass):
    """Truncate the singular values of every weight.

    Args:
        keep, rank, energy, budget, multiple, heads: See :class:`LowRankPass`.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Example:
        >>> Svd(keep=0.7).share
        0.7
    """

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "Factor weights by plain singular value decomposition (no data needed)."
    source: ClassVar[str] = "Eckart & Young, 1936 (Psychometrika 1)"

    def metrics(
        self, block: BlockContext, stage: Sequence[Candidate], known: Mapping[str, Tensor]
    ) -> Mapping[str, Metric | str]:
        """Plain squares."""
        return {candidate.name: Metric(None) for candidate in stage}
