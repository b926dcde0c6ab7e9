"""Which parts of a compressed model are trained, and the state whose graph takes them as inputs.

Every floating tensor of a form is an input of the graph that :func:`fxcompress.apply.apply_state` writes, so
training one is giving that input a differentiable value. Codes have no gradient: their term becomes a dense
one in the training state, whose value is rounded from a latent weight in every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.capture.program import Program
from fxcompress.edits import (
    CompressionState,
    Edit,
    ReviseWeight,
    SetActivation,
    SetTensor,
    SetTransform,
    SetWeight,
)
from fxcompress.form_inputs import TensorRef
from fxcompress.forms import (
    CodebookWeight,
    Component,
    DenseWeight,
    DoubleQuantizedCodebook,
    FloatWeight,
    LowRank,
    QuantizedWeight,
    SiteForm,
    StaticPerTensor,
    WeightTerm,
)
from fxcompress.training.forms import LearnedStep, StraightThrough
from fxcompress.training.values import (
    LowRankUpdate,
    Numbers,
    Relative,
    RoundedCodebook,
    RoundedFloat,
    RoundedIntegers,
    TrainedValue,
    first_factors,
    latent_of,
)

__all__ = ["PARTS", "Steps", "Trainable", "What"]

PARTS = ("weights", "embeddings", "scales", "lora", "floats", "activations")
Steps = Literal["learned", "fixed", "range"]


@dataclass(frozen=True)
class What:
    """What to train.

    Args:
        parts: Any of ``"weights"`` (matrices: dense ones, latent weights behind codes, entries of sparse
            ones, factors), ``"embeddings"`` (tables that are looked up, tied heads included),
            ``"scales"`` (of codes, which stay: PEQA; and learned tables), ``"lora"`` (low-rank branches
            beside frozen weights), ``"floats"`` (gains and biases) and ``"activations"`` (static
            scales of activations).
        steps: Scales of codes that are trained with ``"weights"``: ``"learned"`` (LSQ), ``"fixed"`` or
            ``"range"`` (found from the latent weight in every step: LLM-QAT).
        rank: Of LoRA branches.
        alpha: Their scaling is ``alpha / rank``.
        chosen: Whether a parameter may be trained at all, by name.
        seed: Of the branches' first factors.
    """

    parts: tuple[str, ...] = ("weights",)
    steps: Steps = "learned"
    rank: int = 16
    alpha: float = 16.0
    chosen: Callable[[str], bool] = lambda name: True
    seed: int = 0


@dataclass
class Trainable:
    """The trained parts of one model.

    Args:
        program: The model's graph.
        state: Its edits; not changed.
        what: What to train.
        sites: All weight sites.
        originals: Dense values of compressed parameters, where the state does not know them.

    Attributes:
        training: The state whose graph is trained.
        weights: Trained values of dense parameters, by name.
        tensors: Trained values of tensors in forms of :attr:`training`.
    """

    program: Program
    state: CompressionState
    what: What
    sites: Sequence[Site]
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    training: CompressionState = field(init=False)
    weights: dict[str, TrainedValue] = field(init=False, default_factory=dict)
    tensors: dict[TensorRef, TrainedValue] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.training = self.state.copy()
        self.generator = torch.Generator().manual_seed(self.what.seed)
        self.uses: dict[str, list[Site]] = {}
        for site in self.sites:
            self.uses.setdefault(site.name, []).append(site)
        used = {
            self.program.weight_of[n.name]
            for n in self.program.placeholders()
            if n.name in self.program.weight_of
        }
        for name in sorted(used & self.program.parameters):
            if self.program.weights[name].is_floating_point():
                self._parameter(name)
        for name, form in list(self.training.forms.items()):
            self.training.forms[name] = self._inputs(name, form)

    @property
    def empty(self) -> bool:
        """Whether nothing is trained."""
        return not self.weights and not self.tensors

    # --- choosing ------------------------------------------------------------------------------------------

    def _wants(self, part: str, name: str) -> bool:
        return part in self.what.parts and self.what.chosen(name)

    def _wants_matrix(self, name: str) -> bool:
        looked_up = any(site.kind is SiteKind.EMBEDDING for site in self.uses.get(name, ()))
        return self._wants("embeddings" if looked_up else "weights", name)

    def _takes_lora(self, name: str) -> bool:
        sites = self.uses.get(name, [])
        linear = bool(sites) and all(
            site.kind is SiteKind.LINEAR and site.layout.batch_dims == 0 for site in sites
        )
        return linear and self._wants("lora", name)

    def _parameter(self, name: str) -> None:
        mask = self.state.masks.get(name)
        if self.state.is_compressed(name):
            self.training.forms[name] = self._terms(name, self.state.forms[name])
            return
        value = self.state.weight(name)
        keep = None if mask is None else mask.keep.to(value.device)
        if value.dim() < 2 or name not in self.uses:
            if self._wants("floats", name):
                self.weights[name] = Numbers(value, keep)
        elif self._wants_matrix(name):
            self.weights[name] = Numbers(value, keep)
        elif self._takes_lora(name):
            layout, scaling = self.uses[name][0].layout, self.what.alpha / self.what.rank
            rank = min(self.what.rank, *layout.matrix_shape[1:])
            self.weights[name] = LowRankUpdate(value, layout, rank, scaling, keep, self.generator)

    def _terms(self, name: str, form: SiteForm) -> SiteForm:
        terms = tuple(
            self._term(name, f"terms.{i}", term, len(form.terms)) for i, term in enumerate(form.terms)
        )
        if self._takes_lora(name) and not self._wants_matrix(name):
            side = [
                i for i, term in enumerate(terms) if i and isinstance(term, LowRank) and _dense_factors(term)
            ]
            if side:
                for i in side:
                    self._factors(name, f"terms.{i}", terms[i])
            else:
                terms = (*terms, self._branch(name, len(terms)))
        return dataclasses.replace(form, terms=terms)

    def _term(self, name: str, path: str, term: WeightTerm, count: int) -> WeightTerm:
        """The term in the training graph; registers what of it is trained."""
        weights, scales = self._wants_matrix(name), self._wants("scales", name)
        dtype = self.program.weights[name].dtype
        if isinstance(term, DoubleQuantizedCodebook):
            if not weights and not scales:
                return term
            term = term.expanded()  # trained scales are not rounded to 8 bits
        if weights and isinstance(term, QuantizedWeight | CodebookWeight | FloatWeight):
            target = None
            if count == 1 and path.count(".") == 1:  # nothing else stands for a part of the weight
                target = self.originals.get(name, self.state.dense_target(name))
            self.tensors[TensorRef(name, f"{path}.values")] = self._rounded(name, term, target, dtype)
            return DenseWeight(torch.empty(term.parameter_shape, dtype=dtype, device="meta"))
        if isinstance(term, LowRank):
            u, v = (self._term(name, f"{path}.{f}", getattr(term, f), 2) for f in ("u", "v"))
            return dataclasses.replace(term, u=u, v=v)
        for part in dataclasses.fields(term):
            value = getattr(term, part.name)
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.element_size() == 1:
                continue
            ref = TensorRef(name, f"{path}.{part.name}")
            if part.name == "scale":
                if scales or (weights and self.what.steps == "learned"):
                    self.tensors[ref] = Relative(value)
            elif part.name == "table":
                if scales and value.shape[-2] > 1:  # a table for all rows is a fixed one, or nearly so
                    self.tensors[ref] = Numbers(value)
            elif weights:
                self.tensors[ref] = Numbers(value)
        return term

    def _rounded(
        self, name: str, term: WeightTerm, target: Tensor | None, dtype: torch.dtype
    ) -> TrainedValue:
        latent = latent_of(term, target)
        if isinstance(term, CodebookWeight):
            return RoundedCodebook(term, latent, self.what.steps, dtype)
        if isinstance(term, FloatWeight):
            return RoundedFloat(term, latent, dtype)
        assert isinstance(term, QuantizedWeight)
        mask = self.state.masks.get(name)
        keep = None
        if mask is not None and term.shape == tuple(mask.keep.shape):
            keep = term.layout.to_matrix(mask.keep).to(latent.device)
        return RoundedIntegers(term, latent, self.what.steps, dtype, keep)

    def _branch(self, name: str, index: int) -> LowRank:
        """A new low-rank term beside the frozen ones."""
        layout = self.uses[name][0].layout
        like, (_, rows, columns) = self.program.weights[name], layout.matrix_shape
        rank = min(self.what.rank, rows, columns)
        u, v = first_factors(layout, rank, like, self.generator)
        term = LowRank.of(layout, u.to(like.dtype), v.to(like.dtype))
        self._factors(name, f"terms.{index}", term, self.what.alpha / self.what.rank)
        return term

    def _factors(self, name: str, path: str, term: WeightTerm, scaling: float = 1.0) -> None:
        assert isinstance(term, LowRank)
        for side, factor in (("u", term.u), ("v", term.v)):
            assert isinstance(factor, DenseWeight)
            start = factor.values
            scale = scaling if side == "u" else 1.0
            self.tensors[TensorRef(name, f"{path}.{side}.values")] = Numbers(start, scaling=scale)

    def _inputs(self, name: str, form: SiteForm) -> SiteForm:
        """Let gradients pass the quantizers; train their scales and the form's bias where asked."""
        activation = form.activation
        if activation is not None:
            if isinstance(activation, StaticPerTensor) and self._wants("activations", name):
                activation = LearnedStep(activation)
                self.tensors[TensorRef(name, "activation.inner.scale")] = Relative(activation.inner.scale)
            else:
                activation = StraightThrough(activation)
        edges = tuple(
            dataclasses.replace(edge, quantizer=StraightThrough(edge.quantizer)) for edge in form.edges
        )
        if form.bias is not None and self._wants("floats", name):
            self.tensors[TensorRef(name, "bias")] = Numbers(form.bias)
        return dataclasses.replace(form, activation=activation, edges=edges)

    # --- what comes out ------------------------------------------------------------------------------------

    def edits(self, reason: str) -> Iterator[Edit]:
        """The edits that make :attr:`state` compute what the trained graph computes, by parameter."""
        for name, value in self.weights.items():
            stored = value.stored()
            assert isinstance(stored, Tensor)
            yield SetTensor(name, stored, reason)
        trained = {ref.name for ref in self.tensors}
        for name in sorted(trained):
            old, new = self.state.form(name), self._stored(name, "", self.training.form(name))
            if any(ref.name == name and ref.path.startswith("terms.") for ref in self.tensors):
                kind = ReviseWeight if self.state.is_compressed(name) else SetWeight
                yield kind(name, new.terms, reason)
            if TensorRef(name, "activation.inner.scale") in self.tensors:
                for shared in self._sharing(name):
                    yield SetActivation(shared, new.activation, reason)
            if TensorRef(name, "bias") in self.tensors:
                assert old.bias is not None
                yield SetTransform(name, bias=new.bias, reason=reason)

    def _sharing(self, name: str) -> list[str]:
        """Parameters whose input goes through the very quantizer of ``name``, which the graph holds once."""
        inputs = {site.input for site in self.uses[name]}
        mine = self.state.form(name).activation
        return [
            other
            for other, sites in self.uses.items()
            if (held := self.state.form(other).activation) is not None
            and mine is not None
            and held.same_as(mine)
            and not inputs.isdisjoint(site.input for site in sites)
        ]

    def _stored(self, name: str, path: str, part: Any) -> Any:
        """A component of the training state with trained tensors as they are saved."""
        if isinstance(part, DenseWeight):
            found = self.tensors.get(TensorRef(name, f"{path}.values"))
            stored = None if found is None else found.stored()
            if stored is not None:
                return DenseWeight(stored) if isinstance(stored, Tensor) else stored
            return part
        if isinstance(part, StraightThrough):
            return part.inner
        if isinstance(part, LearnedStep):
            return self._stored(name, f"{path}.inner", part.inner)
        if not isinstance(part, Component):
            return part
        changes: dict[str, Any] = {}
        for item in dataclasses.fields(part):
            value, inner = getattr(part, item.name), f"{path}.{item.name}".lstrip(".")
            if isinstance(value, tuple):
                changes[item.name] = tuple(self._stored(name, f"{inner}.{i}", v) for i, v in enumerate(value))
            elif isinstance(value, Component):
                changes[item.name] = self._stored(name, inner, value)
            elif (found := self.tensors.get(TensorRef(name, inner))) is not None:
                changes[item.name] = found.stored()
        return dataclasses.replace(part, **changes) if changes else part


def _dense_factors(term: LowRank) -> bool:
    return isinstance(term.u, DenseWeight) and isinstance(term.v, DenseWeight)
