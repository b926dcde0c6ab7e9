"""The rotary embedding between a key projection and attention, measured instead of recognised.

The nodes between the weights and the key are run with projections that are the same at every position. A
rotary embedding then turns the key of position 0 into that of position p by a matrix that rotates pairs of
channels, which is solved for; whatever else stands between (norms, parts that are not rotated) is the same
at every position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.analysis.sites import find_sites
from fxcompress.errors import CalibrationError
from fxcompress.forms import PositionRotation
from fxcompress.pass_base import BlockContext
from fxcompress.passes._cache_sites import CachedAttention

_SAME = 1e-3  # largest entry that counts as zero, in a matrix solved from float32 values
_SLOW = 0.05  # radians per position below which a later position tells the frequency better


def find_rotation(block: BlockContext, attention: CachedAttention) -> PositionRotation | str | None:
    """How the attention's keys depend on their position.

    Returns:
        The rotation; None when positions do not change keys; text saying why it is neither.
    """
    key = attention.site.key
    starts = {
        node
        for site in find_sites(block.program)
        for node in [site.node]
        if site.name in attention.site.key_weights and site.kind.value != "embedding"
    }
    inside, outside = _between(key, starts)
    if not starts or key not in inside:
        return "its keys come from no weight"
    given, program = {}, block.program
    weights = [node for node in outside if node.op == "placeholder" and node.name in program.weight_of]
    for node in weights:
        given[node] = block.state.effective(program.weight_of[node.name])
    dynamic = [node for node in outside if node not in given]
    try:
        values = next(block.values([*dynamic, *starts]))
    except CalibrationError as error:
        return str(error)
    given |= {node: values[node] for node in dynamic}
    keys = []
    needed = -(-2 * attention.key_width // attention.heads)
    for _ in range(needed):
        projected = {node: _constant(values[node], block.generator) for node in starts}
        x = _run(key, inside, given | projected)
        keys.append((x.transpose(-1, -2) if attention.site.key_transposed else x)[:1].double())
    groups = keys[0].shape[1] // attention.heads
    stacked = torch.cat([x[0, ::groups] for x in keys])  # [n, T, D]
    return rotation_of(stacked)


def rotation_of(keys: Tensor) -> PositionRotation | str | None:
    """The rotation that relates the same keys at several positions, ``[n, T, D]`` with ``n > D``."""
    _, positions, width = keys.shape
    if positions < 4:
        return "calibration sequences are too short to see positions"
    far = min(positions - 1, 32)
    near, later = _map(keys, 1), _map(keys, far)
    if near is None or later is None:
        return "its keys depend on positions in another way than by a linear map"
    identity = torch.eye(width, dtype=torch.float64)
    if all(torch.allclose(matrix, identity, atol=_SAME) for matrix in (near, later)):
        return None
    off = later.abs() + near.abs()
    size, partner = (off - torch.diag(off.diagonal())).max(1)
    partner = torch.where(size > _SAME, partner, torch.arange(width))
    frequency = _frequency(near, later, far, partner)
    if not torch.equal(partner[partner], torch.arange(width)):
        return "its keys depend on positions in another way than by rotating pairs of channels"
    first = torch.arange(width) < partner
    frequency = torch.where(
        first, frequency, torch.where(partner == torch.arange(width), 0.0, -frequency[partner])
    )
    found = PositionRotation(partner, frequency.float().double().contiguous())
    for position in (1, far):
        place = torch.tensor([position])
        turned = found.undo(keys[None, :, :1], place)[0, :, 0]
        if not torch.allclose(turned, keys[:, position], atol=_SAME * float(keys.abs().max()) * 4, rtol=0):
            return "its keys depend on positions in another way than by rotating pairs of channels"
    return found


def _frequency(near: Tensor, later: Tensor, far: int, partner: Tensor) -> Tensor:
    rows = torch.arange(near.shape[0])
    quick = torch.atan2(-near[rows, partner], near[rows, rows])
    slow = torch.atan2(-later[rows, partner], later[rows, rows]) / far
    return torch.where(quick.abs() > _SLOW, quick, slow)


def _map(keys: Tensor, position: int) -> Tensor | None:
    """``M: [D, D]`` with ``keys[:, position] = keys[:, 0] Mᵀ``, or None when there is none."""
    start, end = keys[:, 0].contiguous(), keys[:, position].contiguous()
    if not bool(torch.isfinite(start).all() and torch.isfinite(end).all()):
        return None
    solved = torch.linalg.pinv(start) @ end
    error = (start @ solved - end).abs().max() / end.abs().max().clamp_min(1e-30)
    return solved.T if float(error) < _SAME else None


def _between(key: fx.Node, starts: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes on the way from ``starts`` to ``key`` in graph order, and what else they read."""
    above, pending = {key}, [key]
    for node in pending:
        for source in node.all_input_nodes if node not in starts else ():
            if source not in above:
                above.add(source)
                pending.append(source)
    reached = set(starts)
    inside = []
    for node in key.graph.nodes:
        if node in above and node not in starts and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            inside.append(node)
    read = [source for node in inside for source in node.all_input_nodes]
    return inside, [node for node in dict.fromkeys(read) if node not in reached]


def _constant(like: Tensor, generator: torch.Generator) -> Tensor:
    row = torch.randn(like.shape[-1], generator=generator, dtype=torch.float32)
    return row.to(like.device, like.dtype).expand(like.shape).contiguous()


def _run(key: fx.Node, inside: list[fx.Node], given: Mapping[fx.Node, Any]) -> Tensor:
    env = dict(given)
    for node in inside:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: env[source])
        assert callable(node.target)
        env[node] = node.target(*args, **kwargs)
    result: Tensor = env[key]
    return result.detach().cpu()
