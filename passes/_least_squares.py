"""Making up for cut units in the weights that read them, without training.

A weight reads ``x = (x_K, x_P)``; the channels P go. On calibration data they are predicted from those that
stay, ``x_P ≈ A x_K + c``, and the prediction is folded into the weight and its bias:

    W_K' = W_K + W_P A,     b' = b + W_P c
    A = C_PK (C_KK + λ I)⁻¹,     c = m_P − A m_K

with the means m and the covariance C of x. That is the least-squares fit of the new output to the old one,
damped towards the plain cut: λ is the damping times the mean of C_KK's diagonal. Without a bias C is E[x xᵀ]
and c = 0. With A = 0 only the constant part is made up for, ``b' = b + W_P m_P`` (An et al., 2024, FLAP,
section 3.3). Channels of a convolution are predicted position by position, so its borders, where padding is
no activation, keep an error of the constant part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup, GroupMember
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.edits import Edit, KeepUnits, SetTensor, SetTransform
from fxcompress.errors import CalibrationError
from fxcompress.pass_base import BlockContext, Statistics
from fxcompress.passes._unit_importance import reading_sites

__all__ = ["MakeUp"]

_DAMPING_TRIES = 6


@dataclass(frozen=True)
class MakeUp:
    """How the weights that read cut units make up for them.

    Args:
        recover: Fit what stays to what went (A above). Else A = 0.
        compensate: Give weights without a bias one where that helps; biases that exist are always used.
        damping: λ as a part of the mean of C_KK's diagonal.
    """

    recover: bool
    compensate: bool
    damping: float

    def carry_out(self, block: BlockContext, group: ChannelGroup, edit: KeepUnits) -> Iterator[Edit]:
        """The cut and the edits that make up for it; inputs are measured before the cut."""
        places = [(member, site) for member, site in reading_sites(block, group) if _can_change(block, site)]
        found: list[Edit] = []
        if places:
            statistics = block.statistics([site for _, site in places], gram=self.recover)
            for member, site in places:
                assert site.input is not None
                gone = _gone(member, group.units, edit.kept, site.layout.shape[member.dim])
                found += self._refit(block, member, site, gone, statistics[site.input.name])
        yield edit
        yield from found

    def _refit(
        self, block: BlockContext, member: GroupMember, site: Site, gone: Tensor, inputs: Statistics
    ) -> Iterator[Edit]:
        weight = block.weight(site.name)
        columns = weight.detach().to("cpu", torch.float64).movedim(member.dim, 0)  # [channels, …]
        flat = columns.flatten(1)
        mean = inputs.mean.to("cpu", torch.float64)
        biased = self._biased(block, site)
        new = flat.clone()
        new[gone] = 0
        note = "without the cut units"
        if self.recover:
            moments = inputs.gram.to("cpu", torch.float64)
            if biased:
                moments = moments - torch.outer(mean, mean)
            plain = _error(flat - new, flat, moments)
            new[~gone] += predict(moments, gone, self.damping, site.name) @ flat[gone]
            note = f"refit: output error {plain:.3g} → {_error(flat - new, flat, moments):.3g}"
            value = new.reshape(columns.shape).movedim(0, member.dim).to(weight)
            yield SetTensor(site.name, value.contiguous(), note)
        if biased:
            change = ((flat - new) * mean[:, None]).reshape(columns.shape).movedim(0, member.dim)
            yield _bias_edit(block, site, site.layout.to_matrix(change)[0].sum(1))

    def _biased(self, block: BlockContext, site: Site) -> bool:
        """Whether the constant part can go into a bias."""
        if site.kind is SiteKind.CONV_TRANSPOSED:  # how many taps reach an output depends on its place
            return False
        return self.compensate or site.bias is not None or block.state.form(site.name).bias is not None


def predict(moments: Tensor, gone: Tensor, damping: float, name: str) -> Tensor:
    """``Aᵀ: [kept, gone]``, the prediction of the channels that go from those that stay.

    Args:
        moments: ``[channels, channels]`` float64, covariance or E[x xᵀ].
        gone: ``[channels]`` bool.
        damping: Part of the mean of the diagonal added to it; ten times more as long as that is not positive
            definite.
        name: Of the weight, for messages.

    Raises:
        CalibrationError: no damping tried makes the matrix positive definite.
    """
    kept = ~gone
    own, cross = moments[kept][:, kept], moments[kept][:, gone]
    size = float(own.diagonal().mean())
    if size <= 0:  # nothing that stays ever differs from its mean
        return torch.zeros_like(cross)
    for attempt in range(_DAMPING_TRIES):
        damped = own + damping * 10**attempt * size * torch.eye(own.shape[0], dtype=own.dtype)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_solve(cross, factor)
    raise CalibrationError(
        f"{name}: the moments of its inputs are not positive definite.",
        fix="use more calibration data or a larger damping.",
    )


def _error(difference: Tensor, weight: Tensor, moments: Tensor) -> float:
    """``‖D x‖ / ‖W x‖`` from the moments of x; ``[channels, outputs]`` each."""
    whole = float((weight * (moments @ weight)).sum())
    return (max(0.0, float((difference * (moments @ difference)).sum())) / whole) ** 0.5 if whole > 0 else 0.0


def _bias_edit(block: BlockContext, site: Site, change: Tensor) -> Edit:
    """Add ``change: [outputs]`` to a site's bias: to the parameter if there is one, else to the form's."""
    held = block.state.form(site.name).bias
    note = "holds the mean of what the cut units gave"
    if held is None and site.bias is not None:
        bias = block.weight(site.bias)
        return SetTensor(site.bias, (bias.double() + change.to(bias.device)).to(bias.dtype), note)
    bias = torch.zeros_like(change) if held is None else held.double().cpu()
    return SetTransform(site.name, bias=bias + change, reason=note)


def _can_change(block: BlockContext, site: Site) -> bool:
    """Whether one matrix (and its bias) is used once, so that its inputs here are all its inputs."""
    if site.layout.batch_dims or (site.bias is None) != (site.bias_node is None):
        return False
    names = [site.name] if site.bias is None else [site.name, site.bias]
    nodes = [node for name in names for node in block.program.weight_node(name)]
    return len(nodes) == len(names) and all(len(node.users) == 1 for node in (*nodes, *site.chain))


def _gone(member: GroupMember, units: int, kept: Tensor, channels: int) -> Tensor:
    """``[channels]`` bool: positions of the units that are cut."""
    cut = torch.ones(units, dtype=torch.bool)
    cut[kept] = False
    gone = torch.zeros(channels, dtype=torch.bool)
    gone[member.positions[cut].flatten()] = True
    return gone
