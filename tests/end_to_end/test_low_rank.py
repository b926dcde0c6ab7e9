"""Low-rank weights through the compiler: the numbers of the reference, on the kernels that serve them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from examples.texts import documentation_text
from fxcompress.calibration import as_calibration
from fxcompress.capture import capture_model
from fxcompress.errors import BindingError
from fxcompress.manager import run_recipe
from tests.end_to_end.zoo_checks import relative
from tests.zoo import entry, scores

SPLIT = {"svd": {"keep": 0.6}}
CODES = {"quantize-weights": {"bits": 4, "group_size": 16}}
RECIPES: dict[str, list[Any]] = {
    "factors": [SPLIT],
    "rounded factors": [SPLIT, CODES, "fuse-siblings"],
    "rounded activations": [SPLIT, {"quantize-weights": {"bits": 8}}, {"quantize-activations": {"bits": 8}}],
    "residual": [CODES, {"low-rank-residual": {"rank": 4, "metric": "weights"}}, "fuse-siblings"],
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_compiled_equals_the_reference_and_survives_saving(recipe: str, tmp_path: Path) -> None:
    animal = entry("llama-tied-odd")
    model = animal.build()
    small = fxcompress.compress(
        model, RECIPES[recipe], example_inputs=animal.inputs(), progress=False, verify="off"
    )
    compiled = scores(small(**animal.inputs()))
    kernels = small.explain()
    small.set_backend("eager")
    reference = scores(small(**animal.inputs()))
    # Machines with bfloat16 products multiply rounded weights in bfloat16.
    assert relative(compiled, reference) < (1e-4 if recipe == "factors" else 2e-2)
    factors = {name: text for name, text in kernels.items() if name.endswith((" (u)", " (v)"))}
    assert len(factors) == 2 * sum(
        "low-rank" in str(form.to_spec("", {})) for form in small.artifact.forms.values()
    )
    assert all(("dense factor" in text) == ("rounded" not in recipe) for text in factors.values()), factors
    assert not any("dequantized at run time" in text for text in kernels.values()), kernels
    rows = [row for row in small.report.rows if "rank" in row.form]
    assert rows
    assert all(row.bytes_after < row.bytes_before for row in rows)
    if recipe in ("rounded factors", "residual"):
        assert small.artifact.fused  # right factors, or the codes, of q/k/v run as one product
    small.save(tmp_path / "small")
    again = fxcompress.load(tmp_path / "small", backend="eager")
    assert torch.equal(scores(again(**animal.inputs())), reference)


class Net(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 16)
        for layer in (self.first, self.second):
            rows, columns = layer.weight.shape
            layer.weight.data = torch.randn(rows, rank) @ torch.randn(rank, columns) / 7

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


@torch.no_grad()
def test_another_rank_under_the_same_code_is_refused_not_computed_wrongly() -> None:
    x = torch.randn(8, 48)
    options = {"recipe": [{"svd": {"energy": 1.0, "multiple": 1}}], "inner": "eager"}
    one, same, other = Net(4), Net(4), Net(6)
    fast, fast_same, fast_other = (
        torch.compile(net, backend="fxcompress", options=options) for net in (one, same, other)
    )
    torch.testing.assert_close(fast(x), one(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fast_same(x), same(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(BindingError, match="compressed to another form"):
        fast_other(x)


@torch.no_grad()
def test_convolutions_compile() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 24, 3, padding=1)
            self.b = nn.Conv2d(24, 24, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.relu(self.a(x)))
            return out

    model, x = Small().eval(), torch.randn(2, 3, 9, 9)
    recipe = [{"svd": {"keep": 0.8, "multiple": 1}}, {"quantize-weights": {"bits": 8}}]
    small = fxcompress.compress(model, recipe, example_inputs=(x,), progress=False, verify="off")
    compiled = small(x)
    small.set_backend("eager")
    assert relative(compiled, small(x)) < 1e-5
    assert {row.form.split(" (")[0] for row in small.report.rows if row.reason != "vector"} == {
        "rank 10",
        "rank 9",
    }


def test_on_the_real_model_the_metric_of_the_inputs_decides(smollm_small: Any, smollm_tokenizer: Any) -> None:
    text = documentation_text("calibration")[:4000]
    ids = smollm_tokenizer(text, return_tensors="pt").input_ids[0, :256].reshape(2, 128)
    program = capture_model(smollm_small, (), {"input_ids": ids[:2, :32], "use_cache": False})
    data = as_calibration([{"input_ids": row[None], "use_cache": False} for row in ids], program)
    only = {"keep": 0.8, "include": ["model.layers.0.self_attn.*"]}
    lost = {
        name: run_recipe(program, [{name: only}], data, verify="end").report for name in ("svd", "svd-llm")
    }
    kl = {name: report.kl for name, report in lost.items()}
    assert kl["svd"] is not None
    assert kl["svd-llm"] is not None
    assert kl["svd-llm"] < 0.5 * kl["svd"]
    totals = lost["svd"].totals
    assert totals["products_after"] < totals["products_before"]
    assert totals["bytes_after"] == lost["svd-llm"].totals["bytes_after"] < totals["bytes_before"]
