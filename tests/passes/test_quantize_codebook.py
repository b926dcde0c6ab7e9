from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress
from fxcompress.edits import SetWeight
from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.formats import CodebookFormat, IntFormat
from fxcompress.formats.codebook import decode_codebook, encode_codebook
from fxcompress.formats.integer import decode, encode, find_parameters
from fxcompress.forms import CodebookWeight
from fxcompress.passes import FuseSiblings, QuantizeCodebook, QuantizeWeights
from fxcompress.passes._kmeans import weighted_kmeans
from tests.passes.models import Attention, Convolutions, Language, Products
from tests.passes.one_block import OneBlock, block_of, compressed, refusals

IDS = torch.arange(12).reshape(2, 6)
X = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1))


def attention() -> OneBlock:
    return block_of(Attention(), (X,))


def term(block: OneBlock, name: str) -> CodebookWeight:
    (found,) = block.state.form(name).terms
    assert isinstance(found, CodebookWeight)
    return found


def loss(w: Tensor, value: Tensor, weights: Tensor | float = 1.0) -> float:
    return float((weights * (w.double() - value.double()).square()).sum())


def learned(w: Tensor, weights: Tensor | None, bits: int) -> Tensor:
    table = weighted_kmeans(w, weights, 1 << bits)[None].to(torch.bfloat16)
    return decode_codebook(encode_codebook(w[None], table, None, 0), table, None, 0, torch.float64)[0]


def test_structure_and_numerics_of_a_fixed_table() -> None:
    block = attention()
    edits = block.run(QuantizeCodebook(group_size=8))
    assert compressed(edits) == [f"{name}.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert all(isinstance(e, SetWeight) and e.reason == "nf4: 4-bit codes, one table, group 8" for e in edits)
    w, found = block.program.weights["q.weight"].detach(), term(block, "q.weight")
    assert found.format == CodebookFormat(4, 8, per_row=False)
    value = found.dense(torch.float32)
    assert torch.equal(block.state.effective("q.weight"), value)
    assert loss(w, value) < 0.02 * loss(w, torch.zeros(()))
    largest = w.unfold(1, 8, 8).abs().amax(-1)
    torch.testing.assert_close(value.unfold(1, 8, 8).abs().amax(-1), largest, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("options", "fmt"),
    [
        ({}, CodebookFormat(4, 0, per_row=False)),  # the default group of 64 exceeds a row
        ({"table": "fp4", "group_size": 7}, CodebookFormat(4, 7, per_row=False)),
        ({"table": "kmeans", "bits": 3}, CodebookFormat(3, None, per_row=True)),
        ({"table": "kmeans", "bits": 2, "group_size": 10}, CodebookFormat(2, 10, per_row=True)),
        ({"table": "kmeans", "per_row": False, "group_size": 0}, CodebookFormat(4, 0, per_row=False)),
    ],
)
def test_formats(options: dict[str, Any], fmt: CodebookFormat) -> None:
    block = attention()
    block.run(QuantizeCodebook(**options))
    assert term(block, "down.weight").format == fmt


def test_a_learned_table_follows_the_input() -> None:
    """The same weights; columns that meet large inputs are met better, and the output with them."""
    scale = torch.ones(20)
    scale[:3] = 30
    plain, weighted = block_of(Attention(), (X * scale,)), block_of(Attention(), (X * scale,))
    plain.run(QuantizeCodebook(table="kmeans", bits=2))
    weighted.run(QuantizeCodebook(table="kmeans", bits=2, weighting="second-moment"))
    w, inputs = plain.program.weights["q.weight"].detach(), (X * scale).reshape(-1, 20)
    errors = [(inputs @ (b.state.effective("q.weight") - w).T).norm() for b in (plain, weighted)]
    assert errors[1] < 0.5 * errors[0]
    assert weighted.asked  # and without weighting no data are run
    assert not plain.asked


def test_embeddings_and_heads_are_left_to_the_next_pass() -> None:
    block = block_of(Language(False), (IDS,))
    reasons = refusals(block.run(QuantizeCodebook(group_size=10)))
    assert reasons["table.weight"] == "embedding, left alone by heads=False"
    assert reasons["head.weight"] == "output head, left alone by heads=False"
    assert compressed(block.run(QuantizeWeights(only_remaining=True))) == ["table.weight", "head.weight"]
    tied = block_of(Language(True), (IDS,))
    assert "table.weight" in compressed(tied.run(QuantizeCodebook(heads=True)))


def test_every_kind_of_site_is_taken_in_its_layout() -> None:
    for table in ("nf4", "kmeans"):
        block = block_of(Convolutions(), (torch.randn(2, 3, 13, 12),))
        weighting = "second-moment" if table == "kmeans" else "none"
        found = compressed(block.run(QuantizeCodebook(table=table, weighting=weighting)))  # type: ignore[arg-type]
        for name in found:
            assert term(block, name).dense(torch.float32).shape == block.program.weights[name].shape
        assert "up.weight" in found
    products = block_of(Products(), (torch.randn(2, 5, 20),))
    edits = products.run(QuantizeCodebook(table="kmeans", bits=2, weighting="second-moment"))
    assert set(compressed(edits)) == {"query", "output", "kn", "many", "after"}
    assert term(products, "many").table.shape == (4, 9, 4)


def test_siblings_fuse_where_tables_allow() -> None:
    for options, fused in (
        ({"group_size": 10}, True),
        ({"table": "kmeans", "bits": 2}, True),
        ({"table": "kmeans", "bits": 2, "per_row": False}, False),
    ):
        block = attention()
        block.run(QuantizeCodebook(**options))  # type: ignore[arg-type]
        block.run(FuseSiblings())
        assert bool(block.state.fused) is fused


def test_a_weight_that_would_not_shrink_is_left_alone() -> None:
    block = block_of(nn.Linear(20, 12), (X,))
    reason = refusals(block.run(QuantizeCodebook(table="kmeans", bits=6)))["weight"]
    assert (
        reason
        == "6-bit codes, table per row, no scales would take 57.2 bits per weight, torch.float32 takes 32"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"table": "nf5"}, RecipeError, "table='nf5', expected one of 'nf4', 'fp4', 'kmeans'"),
        ({"bits": 3}, RecipeError, "bits=3 does not go with table='nf4'"),
        ({"weighting": "second-moment"}, RecipeError, "weighting='second-moment' does not go with"),
        ({"weighting": "fisher"}, RecipeError, "weighting='fisher'"),
        ({"table": "kmeans", "bits": 9}, FormatError, "quantize-codebook: CodebookFormat: bits=9"),
        ({"group_size": -1}, FormatError, "group_size=-1"),
        ({"table": "kmeans", "per_row": 1}, RecipeError, "per_row=1, expected true or false"),
        ({"table": "kmeans", "iterations": 0}, RecipeError, "iterations=0"),
        ({"heads": "yes"}, RecipeError, "heads='yes'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizeCodebook(**options)


def test_only_weighted_tables_need_data() -> None:
    assert not QuantizeCodebook().needs_calibration
    assert QuantizeCodebook(table="kmeans", weighting="second-moment").needs_calibration


def test_faulty_data_are_an_error() -> None:
    block = block_of(Attention(), (torch.full((2, 5, 20), float("nan")),))
    with pytest.raises(CalibrationError, match="NaN or inf"):
        block.run(QuantizeCodebook(table="kmeans", bits=2, weighting="second-moment"))


def test_known_clusters() -> None:
    x = torch.tensor([[0.0, 1.0, 10.0, 11.0], [-4.0, -4.0, 4.0, 4.0], [7.0, 7.0, 7.0, 7.0]])
    known = torch.tensor([[0.5, 10.5], [-4.0, 4.0], [7.0, 7.0]]).double()
    torch.testing.assert_close(weighted_kmeans(x, None, 2), known)
    heavy = torch.tensor([3.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(weighted_kmeans(x[:1], heavy, 2), torch.tensor([[0.25, 10.5]]).double())
    ignored = torch.tensor([0.0, 0.0, 0.0, 0.0])  # counts as unweighted
    torch.testing.assert_close(weighted_kmeans(x[:1], ignored, 2), known[:1])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 120),
    bits=st.integers(2, 4),
    kind=st.sampled_from(["normal", "few values", "heavy tails", "positive", "outlier"]),
    weighted=st.booleans(),
    seed=st.integers(0, 999),
)
def test_kmeans_is_no_worse_than_rounding(
    rows: int, columns: int, bits: int, kind: str, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator).double()
    if kind == "few values":
        w = (w * 1.5).round().clamp(-2, 1)  # at most four
    elif kind == "heavy tails":
        w = w**5
    elif kind == "positive":
        w = w.abs() + 1
    elif kind == "outlier":
        w[:, 0] = 1e4
    weights = torch.rand(columns, generator=generator) ** 4 if weighted else None
    centroids = weighted_kmeans(w, weights, 1 << bits)
    assert centroids.isfinite().all()
    assert (centroids.diff(dim=1) >= 0).all()
    nearest = (w[:, :, None] - centroids[:, None]).abs().amin(-1).square()
    if kind == "few values":
        assert nearest.max() == 0
    fmt = IntFormat(bits, False, 0)
    parameters = find_parameters(w[None], fmt)
    rounded = decode(encode(w[None], *parameters, fmt), *parameters, fmt, torch.float64)[0]
    each = torch.ones(columns) if weights is None else weights
    assert (nearest * each).sum() <= loss(w, rounded, each) * (1 + 1e-4) + 1e-12


def test_kmeans_on_normal_weights_is_near_the_optimum() -> None:
    """Lloyd-Max quantizer of the normal distribution: 0.009497 at 16 levels, 0.03454 at 8 (Max, 1960)."""
    w = torch.randn(4, 20000, generator=torch.Generator().manual_seed(0))
    for bits, optimum in ((4, 0.009497), (3, 0.03454)):
        assert loss(w, learned(w, None, bits)) / w.numel() < optimum * 1.03


def test_equal_weights_are_no_weights() -> None:
    w = torch.randn(3, 50)
    torch.testing.assert_close(weighted_kmeans(w, torch.full((50,), 2.5), 8), weighted_kmeans(w, None, 8))


@torch.no_grad()
def test_scales_quantized_again_run_on_the_same_kernels(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 128)).eval()
    x = torch.randn(3, 128)
    recipe = QuantizeCodebook(double_quant=True, heads=True)
    small = fxcompress.compress(model, recipe, example_inputs=x, progress=False)
    small.save(tmp_path / "saved")
    loaded = fxcompress.load(tmp_path / "saved", model)
    compiled = loaded(x)
    notes = loaded.explain()
    assert set(notes) == {"0.weight", "2.weight"}
    assert all("executed with plain scales" in note for note in notes.values())
    loaded.set_backend("eager")
    exact = loaded(x)
    assert float((compiled - exact).norm() / exact.norm()) < 5e-3
    plain = fxcompress.compress(model, QuantizeCodebook(heads=True), example_inputs=x, progress=False)
    sizes = [one.report.totals["bytes_after"] for one in (small, plain)]
    assert sizes[0] < sizes[1]
    torch._dynamo.reset()
