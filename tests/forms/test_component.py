from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.errors import ArtifactError, FormatError
from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import (
    Component,
    DynamicPerToken,
    QuantizedWeight,
    Scale,
    SiteForm,
    StaticPerTensor,
    WeightLayout,
    WeightTerm,
    component,
    from_spec,
)

GROUPED = IntFormat(bits=4, group_size=8)


def term(fmt: IntFormat = GROUPED, shape: tuple[int, int] = (6, 20)) -> QuantizedWeight:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return quantize_to_term(w, WeightLayout.rows(shape), fmt)


def static(zero: int = 3) -> StaticPerTensor:
    return StaticPerTensor(bits=8, scale=torch.tensor(0.5), zero=torch.tensor(zero, dtype=torch.int32))


def saved(part: Component) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    spec = json.loads(json.dumps(part.to_spec("site", tensors)))
    return spec, tensors


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, Component):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


FORMS = {
    "empty": SiteForm(),
    "asymmetric": SiteForm(terms=(term(),)),
    "symmetric": SiteForm(terms=(term(IntFormat(bits=8, symmetric=True, group_size=0)),)),
    "two terms": SiteForm(terms=(term(), term(IntFormat(bits=2, group_size=-1)))),
    "dynamic": SiteForm(activation=DynamicPerToken(bits=6)),
    "everything": SiteForm(
        terms=(term(),),
        activation=static(),
        transform_in=(Scale(torch.rand(20)), Scale(torch.rand(20))),
        transform_out=(Scale(torch.rand(6)),),
        bias=torch.rand(6),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_round_trip_through_json(name: str) -> None:
    form = FORMS[name]
    spec, tensors = saved(form)
    assert all(key.startswith("site.") for key in tensors)
    assert_same(from_spec(spec, tensors), form)


def test_keys_of_tensors_are_distinct_and_readable() -> None:
    assert set(FORMS["everything"].tensors()) == {
        *("terms.0.codes", "terms.0.scale", "terms.0.zero", "activation.scale", "activation.zero"),
        *("transform_in.0.factor", "transform_in.1.factor", "transform_out.0.factor", "bias"),
    }
    assert len(FORMS["two terms"].tensors()) == 6


def test_bytes_are_those_of_the_tensors() -> None:
    # codes 6 · 10, scales 6 · 3 bfloat16, zeros 6 · 3
    assert term().nbytes == 60 + 36 + 18
    assert SiteForm().nbytes == 0


def test_dense_of_a_form_is_the_sum_of_its_terms() -> None:
    form = FORMS["two terms"]
    expected = form.terms[0].dense(torch.float32) + form.terms[1].dense(torch.float32)
    assert torch.equal(form.dense(torch.float32), expected)
    assert form.dense(torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(FormatError, match="no weight terms"):
        SiteForm().dense(torch.float32)


def test_an_abstract_term_says_what_it_lacks() -> None:
    with pytest.raises(FormatError, match=r"implement emit\(\)"):
        WeightTerm().dense(torch.float32)
    with pytest.raises(FormatError, match="implement parameter_shape"):
        _ = WeightTerm().parameter_shape


# --- reading what was damaged ----------------------------------------------------------------------------


def damaged(change: dict[str, Any], drop: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    spec, tensors = saved(term())
    spec.update(change)
    for name in drop:
        del spec[name]
    return spec, tensors


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({"kind": "ternary"}, (), "'ternary' is unknown to this version"),
        ({"kind": None}, (), "unknown to this version"),
        ({"kind": ["quantized-weight"]}, (), "unknown to this version"),
        ({"more": 1}, (), "'more'"),
        ({}, ("scale",), "expected"),
        ({"scale": {"tensor": "elsewhere"}}, (), "tensor 'elsewhere' is missing"),
        ({"scale": {"file": "x"}}, (), "neither a tensor nor a component"),
        ({"scale": {"component": 3}}, (), "neither a tensor nor a component"),
        ({"scale": 0.5}, (), "quantized-weight"),
        ({"bits": 9}, (), "bits=9"),
        ({"bits": "4"}, (), "bits='4'"),
        ({"bits": 5}, (), r"codes is \(1, 6, 10\)"),
        ({"group_size": 4}, (), r"scale is \(1, 6, 3\)"),
        ({"shape": [6, 21]}, (), r"codes is \(1, 6, 10\)"),
        ({"perm": [0, 0]}, (), "no permutation"),
        ({"symmetric": True}, (), "zero is given exactly when"),
        ({"zero": None}, (), "zero is given exactly when"),
    ],
)
def test_damage_is_reported(change: dict[str, Any], drop: tuple[str, ...], message: str) -> None:
    spec, tensors = damaged(change, drop)
    with pytest.raises(ArtifactError, match=message):
        from_spec(spec, tensors)


@pytest.mark.parametrize("field", ["codes", "scale", "zero"])
def test_tensors_of_another_dtype_or_shape_are_refused(field: str) -> None:
    good = term()
    value = getattr(good, field)
    for bad in (value.to(torch.float32), value[:, :3], value[0]):
        with pytest.raises(FormatError, match=f"{field} is"):
            dataclasses.replace(good, **{field: bad})


def test_quantizers_check_their_fields() -> None:
    for bits in (1, 9):
        with pytest.raises(FormatError, match="bits"):
            DynamicPerToken(bits=bits)
        with pytest.raises(FormatError, match="bits"):
            dataclasses.replace(static(), bits=bits)
    with pytest.raises(FormatError, match=r"scale is \(1,\)"):
        dataclasses.replace(static(), scale=torch.ones(1))
    with pytest.raises(FormatError, match=r"zero is \(\) torch\.int64"):
        dataclasses.replace(static(), zero=torch.tensor(0))


# --- extending -------------------------------------------------------------------------------------------


def test_a_kind_belongs_to_one_class() -> None:
    @component("test-one-class")
    @dataclass(frozen=True, eq=False)
    class First(Component):
        value: int

    assert_same(from_spec({"kind": "test-one-class", "value": 3}, {}), First(3))

    with pytest.raises(ValueError, match="already registered"):

        @component("test-one-class")
        @dataclass(frozen=True, eq=False)
        class Second(Component):
            pass


def test_a_field_that_cannot_be_saved_is_refused() -> None:
    @component("test-unsavable")
    @dataclass(frozen=True, eq=False)
    class Unsavable(Component):
        value: object

    with pytest.raises(TypeError, match=r"x\.value: a component field of type set"):
        Unsavable({1}).to_spec("x", {})
