"""Scores of single weights: what an output loses when one of them becomes zero."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site
from fxcompress.passes._input_rows import matrix_count


def per_row(site: Site, values: Tensor) -> Tensor:
    """``[M, K]`` per matrix (or group of a convolution) to ``[B, N, K]``, or what broadcasts to it."""
    if values.shape[0] == 1:
        return values.unsqueeze(0)
    batch, rows, columns = site.layout.matrix_shape
    count = matrix_count(site)
    return values.repeat_interleave(batch * rows // count, 0).reshape(batch, rows, columns)


def magnitude_scores(site: Site, weight: Tensor) -> Tensor:
    """``|W|: [B, N, K]`` float32 (float64 for a float64 weight)."""
    matrix = site.layout.to_matrix(weight).abs()
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def wanda_scores(site: Site, weight: Tensor, second: Tensor) -> Tensor:
    """``|W_ij| · sqrt(E[x_j²]): [B, N, K]``; ``second: [M, K]`` (Sun et al., 2023)."""
    return magnitude_scores(site, weight) * per_row(site, second.sqrt().to(weight.device))


def cumulative_shares(scores: Tensor) -> Tensor:
    """Share of its row's total that an entry and all lower ones of the row make up.

    Pruning the entries with the least shares of a whole matrix prunes each row until its lost part reaches
    the same α: Wanda's alternative to equal counts per row, without its search for α.
    """
    ordered, index = scores.double().sort(dim=-1, stable=True)
    total = ordered.sum(-1, keepdim=True)
    share = ordered.cumsum(-1) / torch.where(total > 0, total, 1.0)
    return torch.empty_like(share).scatter_(-1, index, share)
