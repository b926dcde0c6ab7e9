"""The pass protocol: a pass is a small frozen dataclass whose fields are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.analysis.edges import Edge
from fxcompress.analysis.site_types import Site
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState, Edit, Refuse, StructuralEdit
from fxcompress.formats import IntFormat
from fxcompress.progress import ProgressOption
from fxcompress.structure.cost import Cost

if TYPE_CHECKING:
    from fxcompress.calibration.inputs import CalibrationData


class Statistics(Protocol):
    """Streaming statistics of one activation tensor ``x`` read as ``[T, K]`` (leading dims are tokens)."""

    count: int  # T so far
    minimum: Tensor  # [K]
    maximum: Tensor  # [K]
    absmax: Tensor  # [K]
    mean: Tensor  # [K]
    mean_abs: Tensor  # [K]
    second_moment: Tensor  # [K]: E[x²]
    variance: Tensor  # [K]: E[(x − mean)²]

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


class SurveyContext(Protocol):
    """What a pass sees of the whole model before its first block is solved. All tensors are read only.

    Attributes:
        program: The graph, cut if an earlier pass cut it.
        state: Edits of the passes before.
        original: The graph before any cut, with the model's own weights.
        data: Calibration batches, or None.
        folder: Where long work may keep checkpoints of its own, or None.
        progress: Told of every step of long work.
    """

    program: Program
    state: CompressionState
    generator: torch.Generator
    original: Program
    data: CalibrationData | None
    folder: Path | None
    progress: ProgressOption

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

    def values(self, nodes: Sequence[fx.Node]) -> Iterator[dict[fx.Node, Any]]:
        """Values of any nodes of the block, or that flow into it, one mapping per calibration batch."""
        ...

    def function(self) -> BlockFunction:
        """The block as a differentiable function."""
        ...

    def inputs(self, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
        """Like :meth:`batches`, for several sites in one run, keyed by ``site.input.name``."""
        ...

    @property
    def groups(self) -> Mapping[str, ChannelGroup]:
        """The whole program's channel groups by name; only structural passes can read them."""
        ...

    @property
    def decisions(self) -> Sequence[StructuralEdit]:
        """What a structural pass decided about this block (see :class:`StructuralPass`); not applied yet."""
        ...


class WholeModel(Protocol):
    """The whole model on calibration data: its loss, without some blocks, and the gradients."""

    @property
    def predicts_tokens(self) -> bool:
        """Whether the loss is the mean negative log-likelihood of the next token.

        It is when the model is causal (found by running it) and gives a score for every token. Else the
        outputs themselves are asked: how much they change, and how sensitive they are.
        """
        ...

    def value(self) -> float:
        """The loss of the model as it is; 0 when it predicts no tokens."""
        ...

    def without_each(self, names: Sequence[str]) -> list[float]:
        """The loss (or relative change of the outputs) without the block that owns each parameter."""
        ...

    def streams(self) -> list[tuple[Tensor, Tensor] | None]:
        """What enters and leaves each block, ``[tokens, width]``; None for blocks that cannot be removed."""
        ...

    def gradients(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Each batch's gradient of the loss with respect to parameters: every name once per batch."""
        ...


class CutModel(Protocol):
    """What the model would cost with fewer units."""

    def of(self, kept: Mapping[str, int]) -> Cost:
        """Exact parameters and operations when groups keep some number of units; others stay whole."""
        ...

    def latency(self, kept: Mapping[str, int], tokens: int, balance: float) -> float:
        """Modelled time of one call, in operations: see :class:`fxcompress.structure.cut_cost.CutCost`."""
        ...


class ModelContext(Protocol):
    """What a structural pass sees of the whole model when it decides. All tensors are read only."""

    program: Program
    state: CompressionState
    round: int  # 0-based, of the pass's rounds
    groups: Mapping[str, ChannelGroup]  # every channel group by name; frozen ones included
    blocks: Sequence[BlockContext]  # in graph order; their statistics are those of the uncut model
    generator: torch.Generator  # seeded per (run seed, pass, round)
    cost: Cost  # parameters and operations of the model as it is now
    first_cost: Cost  # as it was before the first round of this pass

    @property
    def cut_cost(self) -> CutModel:
        """What the model would cost with fewer units."""
        ...

    def whole(self, samples: int | None = None) -> WholeModel:
        """The whole model on ``samples`` calibration batches, spread evenly; None uses all."""
        ...

    def weight(self, name: str) -> Tensor:
        """Current dense tensor of a parameter (see CompressionState.weight)."""
        ...

    def cannot_remove(self, index: int) -> str:
        """Why ``RemoveBlock`` is not possible for a block; empty when it is."""
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

    def survey(self, model: SurveyContext) -> Any:
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


@dataclass(frozen=True)
class StructuralPass(Pass):
    """A pass that cuts units of channel groups, or removes blocks.

    A round has three steps. :meth:`choose` sees the whole model and decides. :meth:`solve` goes through the
    blocks and carries out what was decided for each: its units are masked (zeroed) when it yields
    ``KeepUnits``, so what it measures before is uncut, what later blocks measure is what the cut model gives
    them, and it may yield ``SetTensor`` to make up for the loss. Then the manager cuts the masked units out,
    proves that this changes nothing, and everything that follows sees the smaller model.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"cut-structure"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {
            *("quantized-weights", "quantized-activations", "quantized-cache", "fused-siblings"),
            *("reordered-channels", "low-rank", "sparse-weights", "sparsity-allocation"),
        }
    )

    @property
    def rounds(self) -> int:
        """How many times the pass decides and cuts. Default 1."""
        return 1

    @abstractmethod
    def choose(self, model: ModelContext) -> Iterator[StructuralEdit | Refuse]:
        """Yield ``KeepUnits`` and ``RemoveBlock`` for what to cut, ``Refuse`` for groups left alone.

        Nothing is applied before all is decided.
        """

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Carry out the decisions about one block; the default does nothing else."""
        yield from block.decisions
