"""Forms of weights that stay dense (quantized inputs, gathers, new biases) apply in a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
GATHERED = {"permute-channels": {"pattern": "2:4", "gather": True}}
RECIPES: dict[str, list[Any]] = {
    "inputs alone": [{"quantize-activations": {"bits": 3, "mode": "dynamic"}}],
    "gathered, zeros stored dense": [GATHERED, {"wanda": {"pattern": "2:4"}}],
    "gathered": [{"reorder-channels": {"clusters": 4}}],
    "shifted": [{"suppress-outliers": {"shift": "explicit", "explicit": True}}],
}


class Net(nn.Module):
    """Two layers, the second behind a norm of a sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32)
        with torch.no_grad():
            self.first.weight[:, :8] *= 20

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(x + self.first(x)))
        return y


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_what_runs_is_what_was_measured(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = Net().eval()
    small = fxcompress.compress(model, RECIPES[name], [X], progress=False)
    expected = model(X)
    assert any(form.transform_in or form.activation for form in small.artifact.forms.values())
    assert small.report.relative_error is not None
    small.save(tmp_path / "saved")
    for one in (small, fxcompress.load(tmp_path / "saved", Net().eval())):
        for backend in ("eager", "inductor"):
            one.set_backend(backend)
            error = float((one(X) - expected).norm() / expected.norm())
            assert error == pytest.approx(small.report.relative_error, rel=1e-4, abs=1e-6)
    torch._dynamo.reset()
