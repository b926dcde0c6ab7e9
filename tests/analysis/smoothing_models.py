"""Small modules with one smoothing question each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 12


class Norm(nn.Module):
    """RMS norm written out; ``plus_one`` stores γ and multiplies by 1 + γ."""

    def __init__(self, width: int = WIDTH, *, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.3 + (0.0 if plus_one else 1.0))
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight.float()) if self.plus_one else self.weight * x


class NormTwo(nn.Module):
    """A norm and two linear layers; ``trap`` names what else happens to the norm's output."""

    def __init__(self, trap: str = "", *, plus_one: bool = False) -> None:
        super().__init__()
        self.norm = Norm(plus_one=plus_one)
        self.one, self.two = nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 9, bias=False)
        self.table = nn.Embedding(9, WIDTH)
        if trap == "tied consumer":
            self.table.weight = self.two.weight
        self.trap = trap

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        y, z = self.one(h), self.two(h)
        if self.trap == "second reader":
            return y, z, torch.tanh(h)
        if self.trap == "returned":
            return y, z, h
        if self.trap == "residual":
            return y, z, x + h
        if self.trap == "norm used twice":
            return y, z, self.one(self.norm(y.repeat(1, 1, 2)[..., :WIDTH]))
        if self.trap == "tied consumer":
            return y, z, self.table(torch.zeros(3, dtype=torch.int64))
        if self.trap == "in place":
            return y, z, h.mul_(2.0)
        return y, z


class Pair(nn.Module):
    """Two linear layers with something in between."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 6)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.between in ("gelu", "silu", "relu", "sigmoid", "softmax", "relu_"):
            functions = {
                "softmax": lambda v: torch.softmax(v, -1),
                "sigmoid": torch.sigmoid,
                "relu_": torch.relu_,
            }
            h = functions.get(self.between, getattr(F, self.between, None))(h)
        elif self.between == "shift":
            h = torch.relu(h + self.shift)
        elif self.between == "constant":
            h = h + 1.0
        elif self.between == "square":
            h = h * h
        elif self.between == "scalar":
            h = torch.relu(-h / 3.0 * 2.0)
        elif self.between == "mean":
            h = h.mean(-1, keepdim=True).expand(-1, -1, WIDTH)
        elif self.between == "heads":
            h = h.view(*h.shape[:-1], 3, 4).transpose(-1, -2).flatten(-2)
        elif self.between == "join":
            h = torch.cat([h[..., 4:], torch.sigmoid(h[..., :4])], -1)
        elif self.between == "fold":  # channels j and j + 6 must share a scale
            h = h[..., :6] + h[..., 6:]
            h = torch.cat([h, h], -1)
        elif self.between == "gain":
            h = h * self.gain
        return self.second(h)


class Attention(nn.Module):
    """Grouped-query attention.

    Args:
        heads, groups, size: Query heads, key/value heads, head size.
        fused: One matrix for query, key and value.
        style: How values meet their heads: "expand", "repeat", "gqa" (sdpa's own), "softmax" or "einsum".
    """

    def __init__(
        self, heads: int = 4, groups: int = 2, size: int = 3, *, fused: bool = False, style: str = "expand"
    ):
        super().__init__()
        self.heads, self.groups, self.size, self.fused, self.style = heads, groups, size, fused, style
        self.norm = nn.LayerNorm(WIDTH)
        widths = [heads * size, groups * size, groups * size]
        if fused:
            self.qkv = nn.Linear(WIDTH, sum(widths))
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, width) for width in widths)
        self.o = nn.Linear(heads * size, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        widths = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        q, k, v = self.qkv(h).split(widths, -1) if self.fused else (self.q(h), self.k(h), self.v(h))
        q, k, v = (part.view(*x.shape[:2], -1, self.size).transpose(1, 2) for part in (q, k, v))
        mixed = self._mix(q, k, v, self.heads // self.groups)
        return x + self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, times: int) -> Tensor:
        if self.style == "gqa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.style == "repeat":
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        else:
            batch, groups, length, size = k.shape
            k, v = (
                part[:, :, None].expand(batch, groups, times, length, size).reshape(batch, -1, length, size)
                for part in (k, v)
            )
        if self.style == "softmax":
            return torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        if self.style == "einsum":
            weights = torch.softmax(torch.einsum("bhsd,bhtd->bhst", q, k), -1)
            return torch.einsum("bhst,bhtd->bhsd", weights, v)
        return F.scaled_dot_product_attention(q, k, v)


class Gated(nn.Module):
    """A gated unit after a norm; ``fused`` has one matrix for gate and up."""

    def __init__(self, hidden: int = 10, *, fused: bool = False, bias: bool = False, gate: str = "silu"):
        super().__init__()
        self.norm = Norm()
        self.fused, self.function = fused, getattr(F, gate)
        if fused:
            self.gate_up = nn.Linear(WIDTH, 2 * hidden, bias=bias)
        else:
            self.gate, self.up = nn.Linear(WIDTH, hidden, bias=bias), nn.Linear(WIDTH, hidden, bias=bias)
        self.down = nn.Linear(hidden, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        gate, up = self.gate_up(h).chunk(2, -1) if self.fused else (self.gate(h), self.up(h))
        return x + self.down(self.function(gate) * up)


class Experts(nn.Module):
    """Every token through every expert, weighted by a router; experts are slices of one parameter."""

    def __init__(self, count: int = 3, hidden: int = 8) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, hidden, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(count, WIDTH, hidden) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights = torch.softmax(self.router(h), -1)
        for k in range(self.up.shape[0]):
            x = x + F.linear(torch.relu(F.linear(h, self.up[k])), self.down[k]) * weights[..., k : k + 1]
        return x
