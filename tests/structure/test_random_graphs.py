"""Random networks: whatever groups are found, cutting any units of them equals masking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.analysis.channel_groups import find_channel_groups
from fxcompress.capture import capture_model
from fxcompress.structure.oracle import check_kept

Step = Callable[[list[Tensor]], Tensor]
PROPERTY = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


class Network(nn.Module):
    """Values ``[B, width]`` or ``[B, width, 4, 4]``, each made from earlier ones by a drawn step."""

    def __init__(self, draw: Any, rank: int) -> None:
        super().__init__()
        self.draw, self.rank = draw, rank
        self.parts = nn.ModuleList()
        self.gains = nn.ParameterList()
        self.widths = [6]
        self.steps: list[Step] = []
        self.extend("layer")
        kinds = ["layer", "act", "add", "join", "take", "gate", "heads", "norm", "gain", "layer"]
        for _ in range(draw(st.integers(3, 8))):
            self.extend(draw(st.sampled_from([*kinds, "grouped", "depthwise"] if rank == 4 else kinds)))
        self.head = nn.Linear(sum(self.widths[1:]) * (16 if rank == 4 else 1), 3)
        del self.draw

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(values))
        return self.head(torch.cat(values[1:], 1).flatten(1))

    def extend(self, kind: str) -> None:
        index = self.draw(st.integers(min(1, len(self.widths) - 1), len(self.widths) - 1))
        width = self.widths[index]
        made, step = getattr(self, f"make_{kind}")(index, width)
        self.widths.append(made)
        self.steps.append(step)

    def layer(self, inputs: int, outputs: int, groups: int = 1) -> nn.Module:
        bias = self.draw(st.booleans())
        made = (
            nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=bias)
            if self.rank == 4
            else nn.Linear(inputs, outputs, bias=bias)
        )
        self.parts.append(made)
        return made

    def make_layer(self, index: int, width: int) -> tuple[int, Step]:
        outputs = self.draw(st.sampled_from([4, 6, 8, 12]))
        layer = self.layer(width, outputs)
        return outputs, lambda values: layer(values[index])

    def make_grouped(self, index: int, width: int) -> tuple[int, Step]:
        groups = self.draw(st.sampled_from([n for n in (1, 2, 3, 4) if width % n == 0]))
        outputs = groups * self.draw(st.sampled_from([1, 2, 3]))
        layer = self.layer(width, outputs, groups)
        return outputs, lambda values: layer(values[index])

    def make_depthwise(self, index: int, width: int) -> tuple[int, Step]:
        layer = self.layer(width, width * self.draw(st.sampled_from([1, 2])), width)
        assert isinstance(layer, nn.Conv2d)
        return layer.out_channels, lambda values: layer(values[index])

    def make_act(self, index: int, width: int) -> tuple[int, Step]:
        act = self.draw(st.sampled_from([F.relu, F.silu, torch.sigmoid, torch.cos]))
        return width, lambda values: act(values[index])

    def make_add(self, index: int, width: int) -> tuple[int, Step]:
        others = [other for other in range(1, len(self.widths)) if self.widths[other] == width]
        other = self.draw(st.sampled_from(others))
        return width, lambda values: values[index] + values[other]

    def make_join(self, index: int, width: int) -> tuple[int, Step]:
        other = self.draw(st.integers(1, len(self.widths) - 1))
        if width + self.widths[other] > 24:
            return self.make_take(index, width)
        return width + self.widths[other], lambda values: torch.cat([values[index], values[other]], 1)

    def make_take(self, index: int, width: int) -> tuple[int, Step]:
        if width < 2:
            return self.make_act(index, width)
        at = self.draw(st.integers(1, width - 1))
        if self.draw(st.booleans()):
            return at, lambda values: values[index].split([at, width - at], 1)[0]
        return width - at, lambda values: values[index][:, at:]

    def make_gate(self, index: int, width: int) -> tuple[int, Step]:
        if width % 2:
            return self.make_act(index, width)

        def step(values: list[Tensor]) -> Tensor:
            one, two = values[index].chunk(2, 1)
            return torch.sigmoid(one) * two

        return width // 2, step

    def make_heads(self, index: int, width: int) -> tuple[int, Step]:
        heads = self.draw(st.sampled_from([n for n in (1, 2, 3, 4) if width % n == 0]))
        gain = nn.Parameter(torch.randn(width // heads, *[1] * (self.rank - 2)))
        self.gains.append(gain)
        swap = self.draw(st.booleans())

        def step(values: list[Tensor]) -> Tensor:
            viewed = values[index].unflatten(1, (heads, width // heads)) * gain
            return (viewed.transpose(1, 2) if swap else viewed).flatten(1, 2)

        return width, step

    def make_norm(self, index: int, width: int) -> tuple[int, Step]:
        groups = self.draw(st.sampled_from([n for n in (1, 2, 3) if width % n == 0]))
        norm: nn.Module = nn.GroupNorm(groups, width)
        if self.rank == 4 and self.draw(st.booleans()):
            norm = nn.BatchNorm2d(width)
        self.parts.append(norm)
        return width, lambda values: norm(values[index])

    def make_gain(self, index: int, width: int) -> tuple[int, Step]:
        gain = nn.Parameter(torch.randn(width, *[1] * (self.rank - 2)))
        self.gains.append(gain)
        if self.draw(st.booleans()):
            return width, lambda values: values[index] * gain
        return width, lambda values: values[index] + gain


def verify(data: st.DataObject, rank: int) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    network = Network(data.draw, rank).eval()
    x = torch.randn(2, 6, *[4] * (rank - 2))
    program = capture_model(network, (x,))
    groups = find_channel_groups(program)
    kept = {
        group.name: torch.tensor(
            sorted(data.draw(st.sets(st.integers(0, group.units - 1), min_size=group.least)))
        )
        for group in groups
    }
    if kept:
        assert check_kept(program, groups, kept, [x]) <= 1e-9


@PROPERTY
@given(st.data())
def test_random_dense_networks(data: st.DataObject) -> None:
    verify(data, 2)


@PROPERTY
@given(st.data())
def test_random_convolutional_networks(data: st.DataObject) -> None:
    verify(data, 4)
