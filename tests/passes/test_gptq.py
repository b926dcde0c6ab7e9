from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.analysis.sites import Site, SiteKind
from fxcompress.edits import Edit, SetWeight
from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import decode, encode, find_parameters
from fxcompress.forms import QuantizedWeight
from fxcompress.passes import Gptq, QuantizeWeights
from fxcompress.passes._gptq_solver import gptq_solve
from fxcompress.passes._input_rows import site_rows, unsupported
from tests.passes.models import (
    Attention,
    Autoencoder,
    Convolutions,
    Experts,
    Language,
    Products,
    Sequence1d3d,
)
from tests.passes.one_block import OneBlock, block_of, compressed, refusals

IDS = torch.arange(12).reshape(2, 6)
SMALL = Gptq(group_size=8)
ENDS = torch.tensor([3, 3, 9], dtype=torch.int32)  # nothing is routed to the second expert


def correlated(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw) @ torch.randn(shape[-1], shape[-1], generator=draw)


def attention() -> OneBlock:
    return block_of(Attention(), (correlated(2, 25, 20),), (correlated(1, 40, 20, seed=1),))


def block_for(model: type[nn.Module]) -> OneBlock:
    inputs: dict[type[nn.Module], tuple[Tensor, ...]] = {
        Convolutions: (correlated(2, 3, 13, 12),),
        Sequence1d3d: (correlated(2, 6, 9), correlated(2, 2, 5, 6, 7)),
        Products: (correlated(2, 5, 20),),
        Experts: (correlated(9, 16), ENDS),
    }
    return block_of(model(), inputs[model])


def edit_of(edits: list[Edit], name: str) -> SetWeight:
    (found,) = [edit for edit in edits if isinstance(edit, SetWeight) and edit.name == name]
    return found


def output_error(block: OneBlock, site: Site, x: Tensor) -> float:
    w, new = block.program.weights[site.name], block.state.effective(site.name)
    return float((x @ (new - w).T).detach().norm() / (x @ w.T).detach().norm())


def test_structure_every_linear_weight_once_in_stages() -> None:
    block = attention()
    edits = block.run(SMALL)
    assert compressed(edits) == [f"{n}.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    stages = [tuple(name.removesuffix(".weight") for name in asked) for asked in block.asked]
    assert stages == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    (term,) = edit_of(edits, "q.weight").terms
    assert isinstance(term, QuantizedWeight)
    assert term.format == IntFormat(4, False, 8)
    assert edit_of(edits, "q.weight").reason.startswith("int4 asymmetric, group 8, output error ")


def test_a_block_can_be_calibrated_at_once() -> None:
    block = attention()
    edits = block.run(Gptq(group_size=8, sequential="block"))
    assert len(block.asked) == 1
    staged = attention().run(SMALL)
    assert compressed(edits) == compressed(staged)
    same = edit_of(edits, "q.weight").terms[0].tensors()["codes"]
    assert torch.equal(same, edit_of(staged, "q.weight").terms[0].tensors()["codes"])  # nothing before it
    later = edit_of(edits, "down.weight").terms[0].tensors()["codes"]
    assert not torch.equal(later, edit_of(staged, "down.weight").terms[0].tensors()["codes"])


def test_numerics_equal_the_solver_on_the_gram_of_the_inputs() -> None:
    block = attention()
    (site,) = [site for site in block.sites if site.name == "q.weight"]
    x = torch.cat([value.reshape(-1, 20) for value in block.batches(site)])
    w = block.program.weights["q.weight"]
    expected = gptq_solve(w, x.T @ x / len(x), IntFormat(4, False, 8), shrinkage=0.5)
    edits = block.run(SMALL)
    dense = decode(expected.codes, expected.scale, expected.zero, IntFormat(4, False, 8), torch.float32)[0]
    torch.testing.assert_close(block.state.effective("q.weight"), dense, rtol=0, atol=0)
    assert edit_of(edits, "q.weight").error == pytest.approx(output_error(block, site, x), rel=1e-3)


def test_outputs_change_less_than_by_rounding() -> None:
    model = nn.Sequential(nn.Linear(20, 28), nn.Tanh(), nn.Linear(28, 20))
    inputs = [(correlated(60, 20) / 20,), (correlated(40, 20, seed=1) / 20,)]
    block, plain = block_of(model, *inputs), block_of(model, *inputs)
    output = list(block.program.graph.nodes)[-1].args[0][0]
    before = [block.values(x, [output])[output.name] for x in inputs]
    block.run(Gptq(bits=3, group_size=8))
    plain.run(QuantizeWeights(bits=3, group_size=8, search=True))

    def error(run: OneBlock) -> float:
        after = [run.values(x, [output])[output.name] for x in inputs]
        return float((torch.cat(after) - torch.cat(before)).norm())

    assert error(block) < 0.9 * error(plain)


def test_second_run_is_refused() -> None:
    block = attention()
    block.run(SMALL)
    with pytest.raises(RecipeError, match=r"q\.weight: already compressed by gptq.*reorder"):
        block.run(SMALL)


def test_two_runs_are_equal() -> None:
    first, second = attention().run(SMALL), attention().run(SMALL)
    for one, two in zip(first, second, strict=True):
        assert isinstance(one, SetWeight)
        assert isinstance(two, SetWeight)
        assert one.terms[0].tensors().keys() == two.terms[0].tensors().keys()
        for key, value in one.terms[0].tensors().items():
            assert torch.equal(value, two.terms[0].tensors()[key])


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_are_left_to_the_next_pass(tied: bool) -> None:
    block = block_of(Language(tied), (IDS,))
    reasons = refusals(block.run(SMALL))
    assert reasons.pop("table.weight") == "embedding: a look-up has no input to calibrate with"
    assert set(reasons) == (set() if tied else {"head.weight"})
    rest = compressed(block.run(QuantizeWeights(only_remaining=True)))
    assert rest == (["table.weight"] if tied else ["table.weight", "head.weight"])


def test_both_uses_of_a_shared_weight_count() -> None:
    block = block_of(Language(tied=True), (IDS,))
    block.run(SMALL)
    assert sum(names.count("layer.k.weight") for names in block.asked) == 2


def test_patterns_give_reasons() -> None:
    assert refusals(attention().run(Gptq(group_size=8, exclude=("o.*",)))) == {
        "o.weight": "excluded by 'o.*'"
    }


def test_no_calibration_token_is_a_reason() -> None:
    block = attention()
    block.data = []
    assert set(refusals(block.run(SMALL)).values()) == {"no calibration token reaches it"}
    convolutions = block_for(Convolutions)
    convolutions.data = []
    assert set(refusals(convolutions.run(SMALL)).values()) == {"no calibration token reaches it"}


def test_non_finite_inputs_are_refused_by_name() -> None:
    block = block_for(Convolutions)
    block.data = [(torch.full((2, 3, 13, 12), float("nan")),)]
    with pytest.raises(CalibrationError, match=r"gptq: plain\.weight: the Gram matrix .* NaN or inf"):
        block.run(SMALL)


def product_energy(block: OneBlock, site: Site, inputs: tuple[Any, ...]) -> float:
    """Sum of squares of what the op computes, its bias set to zero."""
    module = block.program.graph_module
    if site.bias is not None:
        block.state.tensors[site.bias] = torch.zeros_like(block.program.weights[site.bias])
    value = block.values(inputs, [site.node])[site.node.name]
    assert module.graph is site.node.graph
    return float(value.double().square().sum())


def rows_energy(block: OneBlock, site: Site, w: Tensor) -> float:
    """The same from the rows and the canonical matrices ``w: [B, N, K]``."""
    total = 0.0
    for rows in site_rows(block, site):
        x = rows.values.detach().double()
        stack = w.detach().double()
        if site.kind is SiteKind.CONV:
            stack = stack.reshape(len(x), -1, x.shape[-1])
        chosen = stack if rows.first is None else stack[rows.first : rows.first + len(x)]
        total += float((x @ chosen.mT).square().sum())
    return total


@pytest.mark.parametrize(
    ("model", "count"), [(Convolutions, 5), (Sequence1d3d, 3), (Products, 5), (Experts, 3)]
)
def test_rows_are_what_the_op_multiplies(model: type[nn.Module], count: int) -> None:
    block = block_for(model)
    checked = 0
    for site in block.sites:
        if unsupported(site) is not None:
            continue
        loose = 2e-2 if site.name == "grouped" else 1e-5  # computed in bfloat16
        expected = product_energy(block, site, block.data[0])
        w = site.layout.to_matrix(block.weight(site.name))
        assert rows_energy(block, site, w) == pytest.approx(expected, rel=loose)
        checked += 1
    assert checked == count


@pytest.mark.parametrize("model", [Convolutions, Sequence1d3d, Products, Experts])
def test_every_kind_of_site_loses_less_than_by_rounding(model: type[nn.Module]) -> None:
    fresh = block_for(model)
    for site in [site for site in fresh.sites if unsupported(site) is None]:
        block = block_for(model)
        (term,) = edit_of(block.run(Gptq(bits=3, group_size=8, include=(site.name,))), site.name).terms
        assert isinstance(term, QuantizedWeight)
        w = site.layout.to_matrix(fresh.weight(site.name))
        parameters = find_parameters(w, term.format, search=True)
        plain = decode(encode(w, *parameters, term.format), *parameters, term.format, torch.float32)
        solved = site.layout.to_matrix(block.state.effective(site.name))
        error, rounding = (rows_energy(fresh, site, value - w) for value in (solved, plain))
        assert 0 < error <= 1.001 * rounding


def test_an_expert_without_tokens_takes_the_mean_of_all() -> None:
    block = block_for(Experts)
    w = block.program.weights["grouped"]
    x = block.data[0][0].bfloat16().float()
    block.run(SMALL)
    dense = block.state.effective("grouped")
    fmt = IntFormat(4, False, 8)
    for expert, rows in enumerate((x[:3], x, x[3:])):
        solved = gptq_solve(w[expert], rows.T @ rows / len(rows), fmt, shrinkage=0.5)
        expected = decode(solved.codes, solved.scale, solved.zero, fmt, torch.float32)[0]
        assert (dense[expert] == expected).float().mean() > 0.99  # the ends of a sum may round apart


def test_many_experts_are_collected_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = block_for(Experts)
    whole.run(SMALL)
    monkeypatch.setattr("fxcompress.passes.gptq._GRAM_NUMBERS", 1)
    parts = block_for(Experts)
    parts.run(SMALL)
    for name in ("grouped", "indexed"):
        same = whole.state.effective(name) == parts.state.effective(name)
        assert same.float().mean() > 0.99


def test_a_weight_read_in_two_directions_uses_the_first() -> None:
    block = block_of(Autoencoder(), (correlated(30, 20),))
    edits = block.run(SMALL)
    assert compressed(edits) == ["code.weight"]
    assert block.asked == [("code.weight",)]


def test_raised_damping_is_reported() -> None:
    block = attention()
    name = "q.weight"
    edits = block.run(Gptq(group_size=8, damping=0, include=(name,)))
    assert "damping raised" not in edit_of(edits, name).reason


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 1}, FormatError, "gptq: IntFormat: bits=1"),
        ({"group_size": -1}, RecipeError, "one scale per matrix is not supported"),
        ({"damping": -0.1}, RecipeError, "damping=-0.1, expected a number 0"),
        ({"damping": float("nan")}, RecipeError, "damping=nan"),
        ({"shrinkage": 1.5}, RecipeError, "shrinkage=1.5, expected a number 0…1"),
        ({"shrinkage": True}, RecipeError, "shrinkage=True"),
        ({"block_columns": 0}, RecipeError, "block_columns=0"),
        ({"sequential": "layer"}, RecipeError, "expected 'block' or 'stage'"),
        ({"search": None}, RecipeError, "search=None, expected true or false"),
        ({"static_groups": False}, RecipeError, "does not go with act_order=True"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Gptq(**options)
