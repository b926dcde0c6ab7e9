"""The pass protocol: a pass is a small frozen dataclass whose fields are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fxcompress.analysis.edges import Edge
from fxcompress.analysis.site_types import Site
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState, Edit
from fxcompress.formats import IntFormat


class Statistics(Protocol):
    """Streaming statistics of one activation tensor ``x`` read as ``[T, K]`` (leading dims are tokens)."""

    count: int  # T so far
    minimum: Tensor  # [K]
    maximum: Tensor  # [K]
    absmax: Tensor  # [K]
    mean: Tensor  # [K]
    mean_abs: Tensor  # [K]
    second_moment: Tensor  # [K]: E[x²]

    @property
    def gram(self) -> Tensor:
        """``[K, K]`` float32: Σ x xᵀ / T. Only when collected with ``gram=True``."""
        ...


class BlockFunction(Protocol):
    """A block as a differentiable function of its parameters, on the inputs the compressed model gives it.

    Used by methods that optimise a block against what it computed before: distillation, learned rounding,
    learned clipping. Gradients are recorded when the caller enables them (``torch.enable_grad``), and pass
    straight through activation quantizers.
    """

    parameters: tuple[str, ...]  # floating parameters that only this block uses

    @property
    def batches(self) -> int:
        """Number of calibration batches."""
        ...

    def target(self, batch: int) -> tuple[Tensor, ...]:
        """Floating outputs of the original block (no edits at all) on the same inputs; no gradients."""
        ...

    def __call__(self, batch: int, tensors: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Floating outputs with all edits so far, and ``tensors`` in place of parameters."""
        ...


class ModelFunction(Protocol):
    """The whole model as a differentiable function of its parameters, on the calibration batches."""

    @property
    def batches(self) -> int:
        """Number of calibration batches."""
        ...

    def __call__(self, batch: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The main output, ``tensors`` in place of parameters; gradients where the caller enables them."""
        ...

    def divergence(self, batch: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Mean KL divergence per token from the unchanged model; without scores ``‖y − ŷ‖²/‖y‖²``."""
        ...

    def loss(self, batch: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean next-token loss in nats; an error for models that score no next tokens."""
        ...

    def sampled_loss(
        self, batch: int, generator: torch.Generator, tensors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Negative log-likelihood of an output drawn from the model itself (for Fisher information)."""
        ...


class ModelContext(Protocol):
    """What a pass sees of the whole model before its first block is solved. All tensors are read only."""

    program: Program
    state: CompressionState
    generator: torch.Generator

    def blocks(self) -> Iterator[BlockContext]:
        """Every block in order, as the passes before left the model."""
        ...

    def function(self) -> ModelFunction:
        """The model as a differentiable function."""
        ...


class BlockContext(Protocol):
    """What a pass sees of one block (a segment of the program). All tensors are read only."""

    program: Program
    state: CompressionState
    index: int  # 0-based number of the block
    name: str  # e.g. "block 3/30" for messages
    sites: Sequence[Site]  # sites whose op lies in this block, in graph order; a tied weight appears per use
    generator: torch.Generator  # seeded per (run seed, pass, block)

    @property
    def survey(self) -> Any:
        """What :meth:`Pass.survey` returned; it is asked for once per run, when first needed."""
        ...

    def weight(self, name: str) -> Tensor:
        """Current dense tensor of a parameter (see CompressionState.weight)."""
        ...

    def statistics(self, sites: Sequence[Site], *, gram: bool = False) -> dict[str, Statistics]:
        """Statistics of the inputs of ``sites``, keyed by ``site.input.name``.

        Sites sharing an input share its statistics. Runs the calibration batches through the block with all
        edits applied so far (including those of earlier blocks, and activation quantizers), so inputs are
        what the compressed model will see.
        """
        ...

    def batches(self, site: Site) -> Iterator[Tensor]:
        """The input tensors of one site (after its input transforms), one per calibration batch."""
        ...

    @property
    def edges(self) -> Sequence[Edge]:
        """Activation edges in this block: values read by products of activations, attention and sums."""
        ...

    def edge_statistics(self, edges: Sequence[Edge]) -> dict[Edge, Statistics]:
        """Statistics of the values on ``edges`` (all dimensions but the last are tokens)."""
        ...

    def function(self) -> BlockFunction:
        """The block as a differentiable function."""
        ...

    def inputs(self, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
        """Like :meth:`batches`, for several sites in one run, keyed by ``site.input.name``."""
        ...


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes. Subclass as ``@dataclass(frozen=True)``; fields are the options.

    Class attributes:
        name: Dashed name used in recipes, e.g. ``"quantize-weights"``.
        summary: One line for ``fxcompress list``.
        source: Paper or reference of the method.
        requires: Capabilities that must have been provided by an earlier pass of the recipe.
        provides: Capabilities this pass gives, e.g. ``{"quantized-weights"}``.
        conflicts: Capabilities that must *not* have been provided earlier (illegal orders, refused by name).
        needs_calibration: Whether data are required.
        preserves_function: The pass promises an unchanged function; the manager proves it in float64.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()
    needs_calibration: ClassVar[bool] = False
    preserves_function: ClassVar[bool] = False

    def matrix_format(self) -> IntFormat | None:
        """The number format this pass gives to matrices; None when it gives none or has no single one."""
        return None

    def activation_format(self) -> tuple[str, int] | None:
        """``("dynamic" | "static", bits)`` when this pass quantizes the inputs of matrices, else None."""
        return None

    def check_later(self, later: Sequence[Pass]) -> None:  # noqa: B027 (a hook: doing nothing is right)
        """Called when a recipe is read, with the passes behind this one; the default accepts any.

        Raises:
            RecipeError: this pass prepares for something other than what follows.
        """

    def survey(self, model: ModelContext) -> Any:
        """Look at the whole model before any block is solved, for decisions that concern all blocks together.

        What it returns is ``block.survey`` in :meth:`solve`. It sees the model as the passes before left it,
        in a resumed run too.
        """
        return None

    @abstractmethod
    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield the edits for one block, in order.

        The manager applies each edit to ``block.state`` as soon as it is yielded, so statistics asked for
        afterwards see it. Must not mutate any tensor it was given.
        """
