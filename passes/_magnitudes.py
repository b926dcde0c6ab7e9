"""Mean magnitudes of the inputs that a weight multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.analysis.site_types import SiteKind
from fxcompress.pass_base import BlockContext
from fxcompress.passes._input_rows import site_rows
from fxcompress.passes._moments import uses as same_uses
from fxcompress.passes._selection import Candidate


def mean_magnitude(block: BlockContext, candidate: Candidate) -> Tensor | None:
    """``[K]`` float64: mean ``|x|`` of every input a weight multiplies, or None when no token reaches it."""
    uses = same_uses(candidate)
    if candidate.primary.kind is SiteKind.LINEAR:
        statistics = block.statistics(uses)
        seen = [statistics[site.input.name] for site in uses if site.input is not None]
        total = sum(entry.count for entry in seen)
        if not total:
            return None
        return sum(entry.mean_abs.double() * (entry.count / total) for entry in seen if entry.count)  # type: ignore[return-value]
    columns = candidate.primary.layout.matrix_shape[2]
    sums, count = torch.zeros(columns, dtype=torch.float64), 0
    for use in uses:
        for rows in site_rows(block, use):
            flat = rows.values.detach().flatten(0, -2)
            sums += flat.double().abs().sum(0).cpu()
            count += len(flat)
    return sums / count if count else None
