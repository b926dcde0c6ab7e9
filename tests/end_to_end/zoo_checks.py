"""What the zoo tests share: compress a small model and compare everything that can be compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import CompressedModel
from fxcompress.forms import Scale
from tests.zoo import ZooEntry, scores

W4A16 = [{"quantize-weights": {"bits": 4, "group_size": 16}}, "fuse-siblings"]
RECIPES: dict[str, Any] = {"w4a16": W4A16, "w8a8": "w8a8"}


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def dense_copy(model: nn.Module, small: CompressedModel) -> nn.Module:
    """The original with every compressed weight replaced by its dequantized value."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name in small.artifact.forms:
            form = small.artifact.forms[name]
            if form.terms:
                value, layout = form.dense(torch.float32), form.terms[0].layout
                for transform in form.transform_in:  # factors of the columns that the weight was divided by
                    assert isinstance(transform, Scale)
                    value = layout.from_matrix(layout.to_matrix(value) * transform.factor)
                dense.get_parameter(name).copy_(value)
    return dense


def compress(animal: ZooEntry, recipe: str) -> tuple[nn.Module, CompressedModel]:
    model = animal.build()
    return model, fxcompress.compress(
        model, RECIPES[recipe], example_inputs=animal.inputs(), progress=False, verify="off"
    )


def check_coverage(model: nn.Module, small: CompressedModel) -> None:
    rows = {row.name: row for row in small.report.rows}
    canonical = {name for name, _ in model.named_parameters()}
    assert canonical <= set(rows)
    for name in canonical:
        row = rows[name]
        assert row.passes or row.reason, f"{name} is unaccounted for"
    assert any(row.bytes_after < row.bytes_before for row in rows.values())


@torch.no_grad()
def check(animal: ZooEntry, recipe: str, folder: Path) -> CompressedModel:
    """Compress, run on the reference backend, save, load, and compare everything that can be compared."""
    model, small = compress(animal, recipe)
    small.set_backend("eager")
    check_coverage(model, small)
    out = scores(small(**animal.inputs()))
    assert torch.isfinite(out).all()
    dense = scores(dense_copy(model, small)(**animal.inputs()))
    # Weight-only forms are exactly the dequantized weights; quantized activations add their own error.
    assert relative(out, dense) < (1e-4 if recipe == "w4a16" else 0.15)
    small.save(folder / "small")
    again = fxcompress.load(folder / "small", None if "plain" not in animal.tags else model, backend="eager")
    assert torch.equal(scores(again(**animal.inputs())), out)
    return small
