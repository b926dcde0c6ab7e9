"""torch.export frontend: dynamic shapes, names, ties, structured calls, readable failures."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.capture import capture_graph_module, capture_model
from fxcompress.errors import CalibrationError, CaptureError
from tests.zoo import SMOKE, ZooEntry, entry, scores


@pytest.mark.parametrize("animal", SMOKE, ids=lambda animal: animal.name)
def test_program_computes_what_the_model_does(animal: ZooEntry) -> None:
    model = animal.build()
    program = capture_model(model, (), animal.inputs())
    with torch.no_grad():
        expected = scores(model(**animal.inputs()))
        torch.testing.assert_close(
            scores(program.run(kwargs=animal.inputs())), expected, rtol=1e-5, atol=1e-5
        )
        if not animal.export_note:
            other = animal.inputs(batch=3, seq=11)
            torch.testing.assert_close(
                scores(program.run(kwargs=other)), scores(model(**other)), rtol=1e-4, atol=1e-4
            )


def test_batch_of_one_stays_dynamic() -> None:
    model = entry("llama").build()
    program = capture_model(model, (), entry("llama").inputs(batch=1, seq=5))
    other = entry("llama").inputs(batch=3, seq=9)
    assert scores(program.run(kwargs=other)).shape[:2] == (3, 9)


def test_tied_weights_are_one() -> None:
    program = capture_model(entry("gpt2-odd").build(), (), entry("gpt2-odd").inputs())
    tied = {alias: name for alias, name in program.aliases.items() if "weight" in alias}
    assert tied == {"lm_head.weight": "transformer.wte.weight"}
    assert sum(bool(node.users) for node in program.weight_node("transformer.wte.weight")) == 1


def test_the_model_is_left_as_it_was() -> None:
    model = entry("llama").build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture_model(model, (), entry("llama").inputs())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@dataclass
class Both:
    total: Tensor
    parts: list[Tensor]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, pair: dict[str, Tensor], *, scale: float = 1.0, extra: Tensor | None = None) -> Both:
        y = self.linear(pair["a"]) * scale + pair["b"]
        return Both(y if extra is None else y + extra, [y, y.relu()])


def test_dicts_keywords_and_dataclasses() -> None:
    if Both not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Both)
    model = Structured().eval()
    args = ({"a": torch.randn(3, 6), "b": torch.randn(3, 4)},)
    kwargs = {"scale": 2.0, "extra": torch.randn(3, 4)}
    program = capture_model(model, args, kwargs)
    assert program.inputs == ("pair_a", "pair_b", "scale", "extra")
    out = program.run(args, kwargs)
    assert isinstance(out, Both)
    torch.testing.assert_close(out.total, model(*args, **kwargs).total)
    with pytest.raises(CalibrationError, match="missing"):
        program.run(args, {"scale": 2.0})


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if float(y.sum()) > 0:  # depends on values: the marker of this line is looked for below
            y = -y
        return y


def test_failure_names_the_users_line() -> None:
    with pytest.raises(CaptureError, match=r"test_export\.py:\d+: if float\(y\.sum\(\)\) > 0"):
        capture_model(Untraceable(), (torch.randn(3, 4),))


def test_plain_graph_module() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 2)).eval()
    traced = torch.fx.symbolic_trace(model)
    program = capture_graph_module(traced, (torch.randn(3, 5),))
    assert sorted(program.parameters) == sorted(dict(model.named_parameters()))
    x = torch.randn(9, 5)
    torch.testing.assert_close(program.run((x,)), model(x))
    with pytest.raises(CaptureError, match=r"expected an fx\.GraphModule"):
        capture_graph_module(model, (x,))  # type: ignore[arg-type]
