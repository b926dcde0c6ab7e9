from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.calibration import as_calibration
from fxcompress.edits import SetTensor, SetTransform
from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.forms import Permute, StaticPerCluster, StaticPerTensor
from fxcompress.manager import run_recipe
from fxcompress.ops import apply_quantizer
from fxcompress.passes import QuantizeActivations, QuantizeWeights, ReorderChannels, SmoothActivations
from fxcompress.passes._clusters import cluster
from fxcompress.passes._grids import cluster_quantizer, static_quantizer
from fxcompress.recipe import Recipe
from tests.passes.models import Attention, Convolutions, Language
from tests.passes.one_block import OneBlock, block_of, refusals

_SEEDED = torch.Generator().manual_seed(0)
_SPREAD = torch.logspace(-2, 1, 20)[torch.randperm(20, generator=_SEEDED)]
X = torch.randn(2, 9, 20, generator=_SEEDED) * _SPREAD
SMALL = {"clusters": 4, "head_clusters": 4}


def attention() -> OneBlock:
    return block_of(Attention(), (X,))


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- k-means ---------------------------------------------------------------------------------------------


def test_clusters_that_are_far_apart_are_found() -> None:
    centres = torch.tensor([[-1.0, 1.0], [-50.0, 60.0], [0.0, 9.0]])
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2])
    points = centres[labels] + torch.rand(8, 2) * 0.1
    found = cluster(points, 3, draw())
    assert found.tolist() == [0, 2, 1, 1, 2, 0, 0, 1]  # numbered by their greatest value


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), count=st.integers(1, 25), distinct=st.integers(1, 20), seed=st.integers(0, 99))
def test_any_points_give_gapless_repeatable_labels(n: int, count: int, distinct: int, seed: int) -> None:
    points = torch.randn(distinct, 2, generator=draw(seed))[
        torch.randint(distinct, (n,), generator=draw(seed))
    ]
    labels = cluster(points, min(count, n), draw(seed))
    assert torch.equal(labels, cluster(points, min(count, n), draw(seed)))
    assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
    assert int(labels.max()) + 1 <= min(count, len(points.unique(dim=0)))


# --- the quantizer ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), bits=st.integers(2, 8), seed=st.integers(0, 99)
)
def test_one_cluster_is_per_tensor_and_single_channels_are_per_channel(
    sizes: list[int], bits: int, seed: int
) -> None:
    width = sum(sizes)
    x = torch.randn(6, width, generator=draw(seed)) * torch.logspace(-1, 1, width)
    low, high = x.amin(0), x.amax(0)
    tensor = apply_quantizer(x, static_quantizer(low.min(), high.max(), bits, "w"))
    assert torch.equal(apply_quantizer(x, cluster_quantizer(low, high, (width,), bits, "w")), tensor)
    each = apply_quantizer(x, cluster_quantizer(low, high, (1,) * width, bits, "w"))
    mixed = apply_quantizer(x, cluster_quantizer(low, high, tuple(sizes), bits, "w"))
    start = 0
    for k in range(width):
        alone = apply_quantizer(x[:, k], static_quantizer(low[k], high[k], bits, "w"))
        assert torch.equal(each[:, k], alone)
    for size in sizes:
        part = slice(start, start + size)
        together = static_quantizer(low[part].min(), high[part].max(), bits, "w")
        assert torch.equal(mixed[:, part], apply_quantizer(x[:, part], together))
        start += size


def test_cluster_quantizers_are_checked() -> None:
    with pytest.raises(FormatError, match=r"StaticPerCluster: zero is \(1,\)"):
        StaticPerCluster(8, torch.tensor([2, 4]), torch.ones(2), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(FormatError, match="bits=1"):
        StaticPerCluster(1, torch.tensor([2]), torch.ones(1), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(CalibrationError, match="NaN or inf"):
        cluster_quantizer(torch.tensor([0.0, float("nan")]), torch.ones(2), (1, 1), 8, "w")


# --- the pass --------------------------------------------------------------------------------------------


def test_structure() -> None:
    block = attention()
    edits = block.run(ReorderChannels(**SMALL))
    assert refusals(edits) == {}
    gathered = {e.name for e in edits if isinstance(e, SetTransform) and e.transform_in}
    assert gathered == {"q.weight", "k.weight", "v.weight", "gate.weight", "up.weight"}
    forms = block.state.forms
    for first, second in (("q", "v"), ("gate", "up")):
        one, two = (forms[f"{name}.weight"].transform_in[0] for name in (first, second))
        assert isinstance(one, Permute)
        assert one.same_as(two)
    folded = {e.name for e in edits if isinstance(e, SetTensor)} - gathered
    assert {"down.weight", "o.weight", "gate.bias", "up.bias", "v.bias"} == folded
    for name in ("q", "o", "gate", "down"):
        sizes = forms[f"{name}.weight"].clusters
        assert sum(sizes) == block.program.weights[f"{name}.weight"].shape[1]
        assert len(sizes) == 4


def test_channels_of_a_cluster_are_alike() -> None:
    block = attention()
    block.run(ReorderChannels(**SMALL))
    site = next(site for site in block.sites if site.name == "q.weight")
    seen = block.statistics([site])[site.input.name]  # type: ignore[union-attr]
    spread = [
        float(part.max() / part.min())
        for part in seen.absmax.split(list(block.state.form("q.weight").clusters))
    ]
    whole = float(seen.absmax.max() / seen.absmax.min())
    assert max(spread[1:]) < whole / 20
    assert torch.equal(
        seen.maximum, X.flatten(0, 1).amax(0)[block.state.form("q.weight").transform_in[0].order]
    )


def test_the_function_is_proven_unchanged_and_clusters_help() -> None:
    program = attention().program
    data = as_calibration([(X,)], program)
    results = {}
    for name, recipe in {
        "cluster": [
            ReorderChannels(**SMALL),
            QuantizeWeights(bits=8),
            QuantizeActivations(bits=4, mode="cluster"),
        ],
        "static": [QuantizeWeights(bits=8), QuantizeActivations(bits=4, mode="static")],
    }.items():
        found = run_recipe(program, recipe, data, verify="each")
        results[name] = found.report
    proof = results["cluster"].checks[0]
    assert proof["pass"] == "reorder-channels"
    assert proof["max_relative_error"] < 1e-12
    assert results["cluster"].relative_error is not None
    assert results["static"].relative_error is not None
    assert results["cluster"].relative_error < 0.7 * results["static"].relative_error


def test_cluster_mode_needs_clusters() -> None:
    block = attention()
    reasons = refusals(block.run(QuantizeActivations(mode="cluster")))
    assert set(reasons.values()) == {"its input channels are in no clusters (run reorder-channels first)"}
    block.run(ReorderChannels(**SMALL))
    assert refusals(block.run(QuantizeActivations(mode="cluster"))) == {}
    assert isinstance(block.state.form("down.weight").activation, StaticPerCluster)
    assert not isinstance(block.state.form("down.weight").activation, StaticPerTensor)


def test_reasons() -> None:
    block = attention()
    reasons = refusals(block.run(ReorderChannels(clusters=24, exclude=("o.*",))))
    assert reasons["o.weight"] == "excluded by 'o.*'"
    assert reasons["q.weight"] == "clusters=24 exceed its 20 input channels"
    assert "down.weight" not in reasons  # it has 28
    kept = attention()
    reasons = refusals(kept.run(ReorderChannels(gather=False, **SMALL)))
    assert set(reasons) == {"q.weight", "k.weight", "v.weight", "gate.weight", "up.weight"}
    assert "layer_norm" in reasons["up.weight"]
    convolutions = block_of(Convolutions(), (torch.randn(2, 3, 13, 12),)).run(ReorderChannels())
    assert all("linear layers only" in reason for reason in refusals(convolutions).values())
    language = block_of(Language(tied=True), (torch.zeros(2, 5, dtype=torch.int64),))
    assert refusals(language.run(ReorderChannels(**SMALL)))["table.weight"] == (
        "embedding: its input keeps its order"
    )


def test_an_excluded_producer_is_gathered_instead() -> None:
    block = attention()
    block.run(ReorderChannels(exclude=("up.bias",), **SMALL))
    assert isinstance(block.state.form("down.weight").transform_in[0], Permute)
    assert "up.bias" not in block.state.tensors


def test_no_data_is_a_reason() -> None:
    block = block_of(Attention(), (X,))
    block.data = []
    assert set(refusals(block.run(ReorderChannels(**SMALL))).values()) == {"no calibration token reaches it"}


def test_second_run_changes_nothing() -> None:
    block = attention()
    block.run(ReorderChannels(**SMALL))
    before = dict(block.state.forms)
    edits = block.run(ReorderChannels(**SMALL))
    assert set(refusals(edits).values()) == {"its channels are in clusters already"}
    assert block.state.forms == before


def test_order_of_passes() -> None:
    for wrong in (["reorder-channels", "smooth-activations"], ["quantize-weights", "reorder-channels"]):
        with pytest.raises(RecipeError):
            Recipe.load(wrong)
    Recipe.load(["smooth-activations", "reorder-channels", "quantize-weights"])
    assert "reordered-channels" in SmoothActivations.conflicts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters=0"),
        ({"head_clusters": 1.5}, "head_clusters=1.5"),
        ({"gather": 1}, "gather=1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ReorderChannels(**options)


def test_a_permutation_is_a_gather() -> None:
    from fxcompress.ops import apply_transforms

    x: Tensor = torch.arange(6.0).reshape(2, 3)
    assert apply_transforms(x, [Permute(torch.tensor([2, 0, 1]))]).tolist() == [[2, 0, 1], [5, 3, 4]]
    with pytest.raises(FormatError, match="int64 vector"):
        Permute(torch.zeros(3))
