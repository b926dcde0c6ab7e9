"""Packing: the same values in fewer bytes, the smallest form, forms by name, artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.calibration import as_calibration
from fxcompress.edits import Repack
from fxcompress.errors import FormatError, RecipeError
from fxcompress.forms import (
    BitmapIndex,
    CsrIndex,
    NmIndex,
    SemiStructuredWeight,
    SparseQuantizedWeight,
    SparseWeight,
    TiledSparseWeight,
)
from fxcompress.manager import run_recipe
from fxcompress.passes.pack_sparse import PackSparse
from fxcompress.passes.prune_magnitude import PruneMagnitude
from fxcompress.passes.quantize_weights import QuantizeWeights
from tests.engine.models import build, capture, tokens
from tests.passes.models import Convolutions, Experts, Language, Products
from tests.passes.one_block import OneBlock, block_of, refusals

IDS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))
MODELS: list[tuple[Any, Any]] = [
    (Language(tied=True), (IDS,)),
    (Convolutions(), (torch.randn(2, 3, 8, 8),)),
    (Products(), (torch.randn(2, 4, 20),)),
    (Experts(), (torch.randn(8, 16), torch.tensor([2, 5, 8], dtype=torch.int32))),
]


def packed(block: OneBlock) -> dict[str, Repack]:
    return {edit.name: edit for edit in block.run(PackSparse()) if isinstance(edit, Repack)}


@pytest.mark.parametrize(("model", "inputs"), MODELS)
@pytest.mark.parametrize(
    "options", [{"sparsity": 0.6}, {"pattern": "2:4", "padding": True}, {"sparsity": 0.97}]
)
@pytest.mark.parametrize(
    "quantize", [None, {"bits": 4, "group_size": 8}, {"bits": 8}, {"bits": 3, "group_size": 0}]
)
def test_values_stay_bit_for_bit(model: nn.Module, inputs: Any, options: Any, quantize: Any) -> None:
    block = block_of(model, inputs)
    block.run(PruneMagnitude(**options))
    if quantize is not None:
        block.run(QuantizeWeights(**quantize))
    before = {name: block.state.effective(name).detach().clone() for name in block.state.masks}
    dense = {name: block.state.form(name).nbytes or before[name].nbytes for name in before}
    double = {n: block.state.forms[n].dense(torch.float64) for n in before if block.state.is_compressed(n)}
    found = packed(block)
    assert found
    for name, edit in found.items():
        assert torch.equal(block.state.effective(name), before[name])
        assert edit.terms[0].nbytes < dense[name]
        assert edit.terms[0].nbytes == sum(tensor.nbytes for tensor in edit.terms[0].tensors().values())
        if name in double:
            assert torch.equal(edit.terms[0].dense(torch.float64), double[name])
            assert isinstance(edit.terms[0], SparseQuantizedWeight)
            assert torch.equal(edit.terms[0].expanded().dense(torch.float64), double[name])


def test_the_smallest_form_is_taken() -> None:
    chosen = {}
    for key, options in {
        "half": {"sparsity": 0.5},
        "2:4": {"pattern": "2:4"},
    }.items():
        block = block_of(Language(tied=False), (IDS,))
        block.run(PruneMagnitude(**options))
        chosen[key] = packed(block)["layer.gate.weight"].terms[0]
    wide = block_of(nn.Linear(512, 8), (torch.randn(2, 512),))
    wide.run(PruneMagnitude(sparsity=0.98))
    chosen["few"] = packed(wide)["weight"].terms[0]
    assert [type(term.index) for term in chosen.values()] == [BitmapIndex, NmIndex, CsrIndex]  # type: ignore[attr-defined]
    size = 28 * 20
    assert chosen["half"].nbytes == 4 * size // 2 + 28 * 3  # a bitmap of 20 columns takes three bytes
    assert chosen["2:4"].nbytes == 4 * size // 2 + 28 * 3
    assert chosen["few"].nbytes == 82 * (4 + 2) + 9 * 4  # 512 · 8 − ⌊0.98 · 512 · 8⌋ entries


def test_a_form_that_is_no_smaller_is_not_taken() -> None:
    block = block_of(Language(tied=False), (IDS,))
    block.run(PruneMagnitude(sparsity=0.1))
    block.run(QuantizeWeights(bits=2, group_size=4))
    left = refusals(block.run(PackSparse()))
    assert (
        "stored dense, the smallest sparse form is no smaller (bitmap int2 asym g4" in left["layer.q.weight"]
    )


@pytest.mark.parametrize(
    ("form", "pattern", "kind"),
    [
        ("nm", "1:4", NmIndex),
        ("bitmap", "", BitmapIndex),
        ("csr", "4:8", CsrIndex),
    ],
)
def test_forms_by_name(form: Any, pattern: str, kind: type) -> None:
    block = block_of(Language(tied=False), (IDS,))
    block.run(PruneMagnitude(pattern=pattern, padding=True))
    before = block.state.weight("layer.q.weight").detach().clone()
    block.run(PackSparse(form=form))
    term = block.state.forms["layer.q.weight"].terms[0]
    assert isinstance(term, SparseWeight)
    assert isinstance(term.index, kind)
    assert torch.equal(term.dense(torch.float32), before)


def test_layouts_of_cuda_kernels() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24)).to(torch.bfloat16)
    for form, kind in (("semi-structured", SemiStructuredWeight), ("tiled", TiledSparseWeight)):
        block = block_of(model, (torch.randn(2, 64, dtype=torch.bfloat16),))
        block.run(PruneMagnitude(pattern="2:4"))
        before = block.state.weight("0.weight").detach().clone()
        edits = block.run(PackSparse(form=form))  # type: ignore[arg-type]
        term = block.state.forms["0.weight"].terms[0]
        assert isinstance(term, kind)
        assert torch.equal(term.dense(torch.bfloat16), before)
        if form == "semi-structured":
            assert term.nbytes == 0.5625 * before.nbytes
            assert "24 × 32 is no multiple of 32 × 32" in refusals(edits)["2.weight"]


def test_layouts_that_do_not_apply_say_why() -> None:
    block = block_of(Language(tied=False), (IDS,))
    block.run(PruneMagnitude(sparsity=0.5))
    assert "not 2:4" in refusals(block.run(PackSparse(form="semi-structured")))["layer.q.weight"]
    assert "tiles hold 16-bit floats" in refusals(block.run(PackSparse(form="tiled")))["layer.q.weight"]
    assert (
        "no positions smaller than a bitmap" in refusals(block.run(PackSparse(form="nm")))["layer.q.weight"]
    )
    with pytest.raises(RecipeError, match="expected one of 'auto'"):
        PackSparse(form="coo")  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["sparse-2of4", "sparse-2of4-w8a8"])
def test_presets_saved_and_loaded(recipe: str, tmp_path: Path) -> None:
    model, ids = build(), tokens()
    made = fxcompress.compress(model, recipe, [{"input_ids": ids}], progress=False)
    made.set_backend("eager")
    made.save(tmp_path / "small")
    loaded = fxcompress.load(tmp_path / "small", model, backend="eager")
    assert torch.equal(made(input_ids=ids), loaded(input_ids=ids))
    rows = {row.name: row for row in loaded.report.rows if row.zeros is not None}
    assert len(rows) == 6
    assert all(row.bytes_after < 0.6 * row.bytes_before for row in rows.values())
    assert "2:4" in rows["layers.0.up.weight"].form


def test_the_smallest_recipe() -> None:
    program = capture()
    data = as_calibration([{"input_ids": tokens(seed=s)} for s in range(2)], program)
    recipe = [{"sparsegpt": {}}, {"gptq": {"bits": 4, "group_size": 16}}, "pack-sparse"]
    rows = {row.name: row for row in run_recipe(program, recipe, data).report.rows}
    up = rows["layers.0.up.weight"]
    assert up.form == "bitmap int4 asym g16"
    assert up.zeros is not None
    stored = 512 - up.zeros
    assert up.bytes_after == (stored + 1) // 2 + 512 // 8 + 32 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(2, 2)}, "non-empty floating vector"),
        ({"index": NmIndex(2, 4, torch.zeros(1, 2, 1, dtype=torch.uint8))}, "stored values do not fit"),
        ({"index": BitmapIndex(torch.zeros(1, 2, 2, dtype=torch.uint8))}, "bits is"),
        (
            {"index": CsrIndex(torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int16))},
            "pointers is",
        ),
        ({"index": NmIndex(4, 2, torch.zeros(1, 2, 1, dtype=torch.uint8))}, "expected 0 < n < m"),
    ],
)
def test_damaged_terms_are_refused(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "shape": (2, 4),
        "perm": (0, 1),
        "batch_dims": 0,
        "row_dims": 1,
        "index": BitmapIndex(torch.zeros(1, 2, 1, dtype=torch.uint8)),
        "values": torch.ones(3),
    }
    SparseWeight(**fields)
    with pytest.raises(FormatError, match=message):
        SparseWeight(**{**fields, **change})
