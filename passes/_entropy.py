"""Information in the channels of an input: entropy of a histogram of each channel's values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site
from fxcompress.pass_base import BlockContext
from fxcompress.passes._input_rows import Rows, matrix_count, site_rows
from fxcompress.passes._scores import magnitude_scores, per_row


def channel_entropy(block: BlockContext, site: Site, bins: int) -> Tensor | None:
    """``−Σ p ln p`` over ``bins`` equal parts of each channel's range, in nats: ``[M, K]`` float32.

    M is 1 where all matrices of the site share their inputs. A channel that never changes has none. None
    when no row reaches the site; a matrix that no row reaches gets zeros.
    """
    low, high = _range(site_rows(block, site), site)
    if not bool((low <= high).any()):
        return None
    counts = torch.zeros(*low.shape, bins)
    width = torch.where(high > low, high - low, 1.0)
    for rows in site_rows(block, site):
        x, at = _placed(rows, low)
        part = ((x - low[at, None]) / width[at, None] * bins).long().clamp(0, bins - 1)  # [M, T, K]
        number = torch.arange(x.shape[0] * x.shape[2]).view(x.shape[0], 1, x.shape[2])
        seen = torch.bincount((part + bins * number).flatten(), minlength=number.numel() * bins)
        counts[at] += seen.view(x.shape[0], x.shape[2], bins)
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(high > low, -torch.xlogy(share, share).sum(-1), 0.0)


def _range(batches: Iterator[Rows], site: Site) -> tuple[Tensor, Tensor]:
    columns = site.layout.matrix_shape[2]
    low = high = torch.empty(0)
    for rows in batches:
        if not low.numel():
            count = 1 if rows.first is None else matrix_count(site)
            low = torch.full((count, columns), torch.inf)
            high = -low
        x, at = _placed(rows, low)
        if x.shape[1]:
            low[at] = torch.minimum(low[at], x.amin(1))
            high[at] = torch.maximum(high[at], x.amax(1))
    return low, high


def _placed(rows: Rows, like: Tensor) -> tuple[Tensor, slice]:
    """Rows ``[M, T, K]`` float32, and which matrices they belong to."""
    x = rows.values.detach().float().cpu()
    first = 0 if rows.first is None else rows.first
    return x, slice(first, first + x.shape[0]) if len(like) > 1 else slice(0, 1)


def entropy_scores(site: Site, weight: Tensor, norm: Tensor, entropy: Tensor, alpha: float) -> Tensor:
    """``|W| · (H + α ‖x‖): [B, N, K]``; ``norm`` and ``entropy``: ``[M, K]``."""
    return magnitude_scores(site, weight) * per_row(site, (entropy + alpha * norm).to(weight.device))
