"""Plain `nn.Module`s for tests: the networks and weight uses that no language model shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Three linear layers with a norm in front and GELU between: `[B, 30] -> [B, 11]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(30)
        self.first = nn.Linear(30, 50)
        self.second = nn.Linear(50, 35)
        self.last = nn.Linear(35, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.first(self.norm(x)))
        out: Tensor = self.last(F.relu(self.second(hidden)))
        return out


class TiedAutoencoder(nn.Module):
    """One parameter used as a linear weight and, transposed, in a matmul: `[B, 27] -> [B, 27]`."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(27, 12)
        self.shift = nn.Parameter(torch.zeros(27))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encode(x)) @ self.encode.weight + self.shift


class SharedLayers(nn.Module):
    """Two names for one linear layer, which also runs three times in a row: `[B, 24] -> [B, 24]`."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(24, 24)
        self.alias = self.block

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.block, self.alias, self.block):
            x = x + torch.tanh(layer(x))
        return x


class BasicBlock(nn.Module):
    """ResNet's two-convolution block with batch norm and, where the shape changes, a 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual net: `[B, 3, H, W] -> [B, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.stages = nn.Sequential(BasicBlock(12, 12, 1), BasicBlock(12, 20, 2), BasicBlock(20, 36, 2))
        self.head = nn.Linear(36, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = self.stages(self.stem(image))
        out: Tensor = self.head(features.mean(dim=(2, 3)))
        return out


class DepthwiseSeparable(nn.Module):
    """Inverted bottleneck, depthwise and grouped convolutions, squeeze-excite: `[B, 3, H, W] -> [B, 7]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.expand = nn.Conv2d(16, 40, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(40)
        self.depthwise = nn.Conv2d(40, 40, 3, 1, 1, groups=40, bias=False)
        self.norm2 = nn.BatchNorm2d(40)
        self.squeeze = nn.Conv2d(40, 10, 1)
        self.excite = nn.Conv2d(10, 40, 1)
        self.project = nn.Conv2d(40, 16, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, 1, 1, groups=4)
        self.head = nn.Linear(24, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = F.hardswish(self.stem(image))
        y = F.relu6(self.norm1(self.expand(x)))
        y = F.relu6(self.norm2(self.depthwise(y)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.norm3(self.project(y * gate))
        x = F.relu(self.grouped(x))
        out: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return out


class UNet(nn.Module):
    """Transposed convolutions and skip concatenation: `[B, 3, H, W] -> [B, 2, H, W]`, 4 divides H and W."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 10, 3, padding=1)
        self.down2 = nn.Conv2d(10, 18, 3, padding=1)
        self.bottom = nn.Conv2d(18, 30, 3, padding=1)
        self.norm = nn.GroupNorm(3, 30)
        self.up2 = nn.ConvTranspose2d(30, 18, 2, stride=2)
        self.merge2 = nn.Conv2d(36, 18, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(18, 10, 2, stride=2)
        self.merge1 = nn.Conv2d(20, 10, 3, padding=1)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        skip1 = F.relu(self.down1(image))
        skip2 = F.relu(self.down2(F.max_pool2d(skip1, 2)))
        x = F.silu(self.norm(self.bottom(F.max_pool2d(skip2, 2))))
        x = F.relu(self.merge2(torch.cat([self.up2(x), skip2], dim=1)))
        x = F.relu(self.merge1(torch.cat([self.up1(x), skip1], dim=1)))
        out: Tensor = self.out(x)
        return out


class DenseNet(nn.Module):
    """Every layer reads what all before it gave: `[B, 3, H, W] -> [B, 6]`, 2 divides H and W."""

    def __init__(self, growth: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        widths = [10 + growth * index for index in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[:-1])
        self.squeezes = nn.ModuleList(nn.Conv2d(width, 14, 1, bias=False) for width in widths[:-1])
        self.grows = nn.ModuleList(nn.Conv2d(14, growth, 3, padding=1, bias=False) for _ in widths[:-1])
        self.norm = nn.BatchNorm2d(widths[-1])
        self.halve = nn.Conv2d(widths[-1], 18, 1, bias=False)
        self.head = nn.Linear(18, 6)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for norm, squeeze, grow in zip(self.norms, self.squeezes, self.grows, strict=True):
            x = torch.cat([x, grow(squeeze(F.relu(norm(x))))], dim=1)
        x = F.avg_pool2d(self.halve(F.relu(self.norm(x))), 2)
        out: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return out


class TemporalConv(nn.Module):
    """Causal dilated gated 1-d convolutions: `[B, 5, T] -> [B, 4, T]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(5, 14, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(14, 28, 2, dilation=2**i) for i in range(3))
        self.mix = nn.ModuleList(nn.Conv1d(14, 14, 1) for _ in range(3))
        self.head = nn.Conv1d(14, 4, 1)

    def forward(self, series: Tensor) -> Tensor:
        x = self.stem(series)
        for level, (dilated, mix) in enumerate(zip(self.dilated, self.mix, strict=True)):
            value, gate = dilated(F.pad(x, (2**level, 0))).chunk(2, dim=1)
            x = x + mix(torch.tanh(value) * torch.sigmoid(gate))
        out: Tensor = self.head(x)
        return out


class VolumeNet(nn.Module):
    """3-d convolutions over a volume: `[B, 2, D, H, W] -> [B, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(2, 9, 3, padding=1)
        self.norm = nn.BatchNorm3d(9)
        self.conv2 = nn.Conv3d(9, 15, (1, 3, 3), stride=2, padding=(0, 1, 1))
        self.head = nn.Linear(15, 6)

    def forward(self, volume: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(volume)))
        x = F.relu(self.conv2(x))
        out: Tensor = self.head(x.mean(dim=(2, 3, 4)))
        return out


class EinsumWeights(nn.Module):
    """Attention, projections by einsum over `[heads, model, head]`: `[B, S, 36] -> [B, S, 36]`."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, 36, 10) / 6)
        self.key = nn.Parameter(torch.randn(3, 36, 10) / 6)
        self.value = nn.Parameter(torch.randn(3, 36, 10) / 6)
        self.output = nn.Parameter(torch.randn(3, 10, 36) / 6)

    def forward(self, x: Tensor) -> Tensor:
        query = torch.einsum("bsm,hmd->bhsd", x, self.query)
        key = torch.einsum("bsm,hmd->bhsd", x, self.key)
        value = torch.einsum("bsm,hmd->bhsd", x, self.value)
        weights = torch.softmax(torch.einsum("bhsd,bhtd->bhst", query, key) / 10**0.5, dim=-1)
        return torch.einsum("bhsd,hdm->bsm", weights @ value, self.output)


class BatchedWeights(nn.Module):
    """Four experts at once by bmm and baddbmm over 3-d parameters: `[B, 26] -> [4, B, 13]`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 26, 34) / 5)
        self.up_bias = nn.Parameter(torch.zeros(4, 1, 34))
        self.down = nn.Parameter(torch.randn(4, 34, 13) / 6)

    def forward(self, x: Tensor) -> Tensor:
        repeated = x.unsqueeze(0).expand(4, -1, -1)
        hidden = F.relu(torch.baddbmm(self.up_bias, repeated, self.up))
        return torch.bmm(hidden, self.down)


class MatmulForms(nn.Module):
    """A product as addmm, matmul on `.T`, mm, and F.linear on a slice: `[B, 20] -> [B, 20]`."""

    def __init__(self) -> None:
        super().__init__()
        self.addmm_weight = nn.Parameter(torch.randn(20, 25) / 4)
        self.addmm_bias = nn.Parameter(torch.zeros(25))
        self.matmul_weight = nn.Parameter(torch.randn(30, 25) / 5)
        self.mm_weight = nn.Parameter(torch.randn(30, 25) / 5)
        self.sliced_weight = nn.Parameter(torch.randn(40, 25) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.addmm(self.addmm_bias, x, self.addmm_weight))
        x = torch.relu(x @ self.matmul_weight.T)
        x = torch.relu(torch.mm(x, self.mm_weight))
        return F.linear(x, self.sliced_weight[:20])


@dataclass
class RankerOutput:
    """Result of `Ranker`: `score` float `[B]`, `features` float `[B, 21]`."""

    score: Tensor
    features: Tensor


torch.export.register_dataclass(RankerOutput, serialized_type_name="tests.RankerOutput")


class Ranker(nn.Module):
    """Keyword-only inputs, an embedding, an optional flag and a dataclass as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(50, 18)
        self.dense = nn.Linear(7, 18)
        self.join = nn.Linear(36, 21)
        self.score = nn.Linear(21, 1)

    def forward(self, *, item: Tensor, context: Tensor, squash: bool = False) -> RankerOutput:
        joined = torch.cat([self.items(item), F.silu(self.dense(context))], dim=-1)
        features = F.silu(self.join(joined))
        score = self.score(features).squeeze(-1)
        return RankerOutput(score=torch.sigmoid(score) if squash else score, features=features)


class Recurrent(nn.Module):
    """A GRU whose weights no linear site sees, then a linear head: `[B, S, 9] -> [B, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(9, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        out: Tensor = self.head(states[:, -1])
        return out
