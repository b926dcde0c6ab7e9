"""A pass of your own: set the smallest weights of every linear site to zero, then quantize what is left.

Run: python examples/own_pass.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import fxcompress
from fxcompress.analysis.site_types import SiteKind
from fxcompress.edits import Refuse, SetTensor
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext


@fxcompress.register_pass
@dataclass(frozen=True)
class ZeroSmallWeights(fxcompress.Pass):
    """Zero the ``fraction`` of each linear weight with the least magnitude."""

    fraction: float = 0.3

    name: ClassVar[str] = "zero-small-weights"
    summary: ClassVar[str] = "Set the smallest weights of linear sites to zero."
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise RecipeError(f"zero-small-weights: fraction={self.fraction}, expected 0 <= fraction < 1.")

    def solve(self, block: BlockContext) -> Iterator[fxcompress.Edit]:
        for name, site in {site.name: site for site in block.sites}.items():
            if site.kind is not SiteKind.LINEAR:
                yield Refuse(name, f"{site.kind.value} sites are left alone")
                continue
            weight = block.weight(name)
            cut = torch.quantile(weight.abs().flatten()[: 1 << 20].float(), self.fraction)
            yield SetTensor(name, weight.masked_fill(weight.abs() < cut, 0), f"zeroed below {float(cut):.3g}")


def main() -> None:
    """Compress a small network with the new pass and print what happened."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    recipe = [{"zero-small-weights": {"fraction": 0.5}}, {"quantize-weights": {"bits": 4, "group_size": 32}}]
    small = fxcompress.compress(model, recipe, example_inputs=torch.randn(8, 64), progress=False)
    small.report.show()


if __name__ == "__main__":
    main()
