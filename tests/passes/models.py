"""Tiny models for the passes' tests; each class names what its sites show."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Three siblings, an output layer, a gated pair, residual sums; 20 is no multiple of a group of 8."""

    def __init__(self, width: int = 20, hidden: int = 28) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Language(nn.Module):
    """Embedding, one layer, head; ``tied`` shares the embedding's table with the head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 20)
        self.layer = Attention()
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 50, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layer(self.table(ids))
        key = self.layer.k(h)  # returned like a cache: no head, it is used at two places
        return torch.tanh(self.head(self.norm(h)[:, -1:]) / 30) * 30, key


class Autoencoder(nn.Module):
    """One weight read in two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.code(x)) @ self.code.weight


class Convolutions(nn.Module):
    """Plain, strided, grouped, depthwise, 'same', pointwise and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding="same", groups=12, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, dilation=2)
        self.up_grouped = nn.ConvTranspose2d(6, 4, (2, 3), stride=(1, 2), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.strided(torch.relu(self.plain(x))))
        return self.up_grouped(self.up(self.depthwise(x)))


class Sequence1d3d(nn.Module):
    """Causal one-dimensional and three-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(6, 6, 4, padding=3, groups=6)
        self.volume = nn.Conv3d(2, 5, (2, 3, 2), stride=(1, 2, 1))
        self.line_up = nn.ConvTranspose1d(6, 7, 3, stride=2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.line_up(self.line(x)[..., :-3]), self.volume(y)


class Products(nn.Module):
    """einsum, addmm-like matmul, bmm, baddbmm and a matmul that broadcasts over its matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, 20, 10) / 5)
        self.output = nn.Parameter(torch.randn(3, 10, 20) / 5)
        self.kn = nn.Parameter(torch.randn(20, 16) / 5)
        self.many = nn.Parameter(torch.randn(4, 16, 9) / 4)
        self.after = nn.Parameter(torch.randn(4, 9, 11) / 4)
        self.bias = nn.Parameter(torch.zeros(4, 1, 11))
        self.scaled = nn.Parameter(torch.randn(20, 20))

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("bsm,hmd->bhsd", x, self.query)
        x = torch.einsum("bhsd,hdm->bsm", heads, self.output) + self.scaled.sum()
        h = (x @ self.kn).flatten(0, 1)
        return torch.baddbmm(self.bias, torch.matmul(h, self.many), self.after)


class Experts(nn.Module):
    """Experts by grouped matmul over routed rows, and by indexing with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Parameter(torch.randn(3, 24, 16) / 4)
        self.indexed = nn.Parameter(torch.randn(2, 8, 24) / 4)

    def forward(self, x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        h = torch._grouped_mm(x.bfloat16(), self.grouped.transpose(1, 2).bfloat16(), offs=ends).float()
        return F.linear(h[0:4], self.indexed[0]), F.linear(h[4:], self.indexed[1])
