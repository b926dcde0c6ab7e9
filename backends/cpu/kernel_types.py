"""What a linear kernel is: the use it serves, its input, its interface."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxcompress.backends.cpu.epilogues import PLAIN, Epilogue
from fxcompress.backends.cpu.generator import MANY_ROWS
from fxcompress.backends.cpu.layouts import Layout


@dataclass(frozen=True)
class LinearSpec:
    """What a kernel needs to know of a linear use.

    Args:
        bits, symmetric, group_size: Of the weight; ``group_size`` as in QuantizedWeight.
        rows: N, of all siblings together.
        columns: K.
        activation: ``"dynamic"``, ``"static"`` or None.
        activation_bits: Width of an activation code.
        table: ``"shared"`` or ``"rows"`` for codes that index one table, or one per row; else None.
        tokens: Number of activation rows when known while compiling, else None (then taken to be many).
        dtype: Of the activations.
        scaled: Whether there are scales at all (a table may have none).
    """

    bits: int
    symmetric: bool
    group_size: int
    rows: int
    columns: int
    activation: str | None
    tokens: int | None
    dtype: torch.dtype
    activation_bits: int = 8
    table: str | None = None
    scaled: bool = True

    @property
    def many_rows(self) -> bool:
        """Whether a prefill kernel fits better than a decode kernel."""
        return self.tokens is None or self.tokens >= MANY_ROWS

    @property
    def per_row(self) -> bool:
        """Whether every row has one scale."""
        return self.group_size <= 0


@dataclass(frozen=True)
class QuantizedInput:
    """An activation as the graph quantized it: ``x ≈ scale · (codes − zero)``."""

    codes: Tensor  # int8 [..., K]
    scale: Tensor  # [..., 1] or 0-d
    zero: Tensor | None  # 0-d
    source: Tensor  # [..., K], what was quantized


class SinglePlan(NamedTuple):
    """How a product with a weight of its own kind is computed.

    Args:
        layout: How the weight lies.
        position: Of one of its tensors among the block inputs.
        run: ``(x [..., K], packed, bias or None)`` → the product.
    """

    layout: Layout
    position: int
    run: Callable[[Tensor, dict[str, Tensor], Tensor | None], Tensor]


class Kernel(abc.ABC):
    """One way to compute a linear use.

    Attributes:
        name: What it is called in explanations.
        layout: How it wants the weight to lie.
    """

    name: str
    layout: Layout

    @abc.abstractmethod
    def refuses(self, spec: LinearSpec) -> str | None:
        """Why the kernel cannot serve ``spec``, or None when it can."""

    @abc.abstractmethod
    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """``[..., rows]`` without bias, in ``spec.dtype``; ``x: [..., K]`` is the (fake-quantized) input."""

    def run(
        self,
        x: Tensor,
        quantized: QuantizedInput | None,
        packed: dict[str, Tensor],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The product plus ``bias: [rows]``; kernels that add it themselves override this."""
        y = self.product(x, quantized, packed, spec)
        return y if bias is None else y + bias

    def describe(self, spec: LinearSpec) -> str:
        """What ``explain()`` says of a site."""
        return self.name


class BiasKernel(Kernel):
    """A kernel that adds the bias itself."""

    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        return self.run(x, quantized, packed, spec)

    @abc.abstractmethod
    def run(
        self,
        x: Tensor,
        quantized: QuantizedInput | None,
        packed: dict[str, Tensor],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Kernel.run`."""


class EpilogueKernel(BiasKernel):
    """A kernel that also does what follows the product."""

    @abc.abstractmethod
    def layout_with(self, epilogue: Epilogue) -> Layout | None:
        """The layout that the kernel reads with an epilogue, or None where it takes none such."""

    @abc.abstractmethod
    def run_with(
        self,
        epilogue: Epilogue,
        x: Tensor,
        quantized: QuantizedInput | None,
        packed: dict[str, Tensor],
        spec: LinearSpec,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """:meth:`run` and what follows it; ``packed`` and ``bias`` lie as :meth:`layout_with` says."""

    def run(
        self,
        x: Tensor,
        quantized: QuantizedInput | None,
        packed: dict[str, Tensor],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Kernel.run`."""
        return self.run_with(PLAIN, x, quantized, packed, spec, bias, None)
