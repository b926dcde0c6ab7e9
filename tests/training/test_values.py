"""Trained values: what is computed is what is stored, and gradients are those of the methods."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.formats.codebook import CodebookFormat, encode_codebook, fixed_table, largest_magnitudes
from fxcompress.formats.floating import FloatFormat, quantize_to_float_term
from fxcompress.formats.integer import decode
from fxcompress.formats.packing import pack_codes, unpack_codes
from fxcompress.forms import CodebookWeight, DoubleQuantizedCodebook, WeightLayout
from fxcompress.forms.double_quantized import round_to_codebook
from fxcompress.training.values import (
    LowRankUpdate,
    Numbers,
    Relative,
    RoundedCodebook,
    RoundedFloat,
    RoundedIntegers,
    latent_of,
)


def moved(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def nf4(w: Tensor, group: int) -> CodebookWeight:
    fmt = CodebookFormat(4, group, per_row=False)
    scale = largest_magnitudes(w[None], fmt)
    table = fixed_table("nf4").reshape(1, 1, -1)
    codes = pack_codes(encode_codebook(w[None], table, scale, group), 4)
    return CodebookWeight(4, group, tuple(w.shape), (0, 1), 0, 1, codes, table, scale)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(2, 21),
    st.integers(2, 8),
    st.sampled_from([-1, 0, 3, 8]),
    st.booleans(),
    st.sampled_from(["learned", "fixed", "range"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 10_000),
)
def test_rounded_integers_store_what_they_compute(
    n: int, k: int, bits: int, group: int, symmetric: bool, steps: str, dtype: torch.dtype, seed: int
) -> None:
    if group > k:
        group = 0
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator).to(dtype)
    w[0] = 0  # a dead channel
    keep = torch.rand(1, n, k, generator=generator) > 0.3
    masked = w * keep[0]
    term = quantize_to_term(masked, WeightLayout.rows(w.shape), IntFormat(bits, symmetric, group))
    value = RoundedIntegers(term, latent_of(term, masked), steps, dtype, keep)
    if steps != "range":
        assert torch.equal(value(), term.dense(dtype))  # training starts at the solver's codes
    moved(value, seed)
    assert torch.equal(value(), value.stored().dense(dtype))
    assert not bool((value()[~keep[0]] != 0).any())


def test_a_solvers_codes_are_kept_where_the_dense_weight_rounds_elsewhere() -> None:
    w = torch.linspace(-1, 1, 32).reshape(2, 16)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(bits=3, group_size=0))
    other = quantize_to_term(w + 0.1, WeightLayout.rows(w.shape), IntFormat(bits=3, group_size=0))
    latent = latent_of(other, w)
    assert torch.equal(RoundedIntegers(other, latent, "fixed", w.dtype, None)(), other.dense(w.dtype))
    assert not torch.equal(latent[0], latent_of(other, None)[0])  # but the latent weight leans towards w
    far = latent_of(term, w + 10)  # codes that were made from something else
    assert torch.equal(far, latent_of(term, None))


def test_a_learned_scale_has_the_gradient_of_learned_steps() -> None:
    w = torch.tensor([[0.3, -1.4, 2.6, 0.1]], dtype=torch.float64)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(2, True, 0))
    value = RoundedIntegers(term, latent_of(term, None), "learned", torch.float64, None)
    with torch.no_grad():
        value.latent.copy_(w[None])
        value.scale.factor.fill_(0.5)  # clips the largest
    scale = float(value.scale().detach())
    up = torch.tensor([[1.0, -2.0, 3.0, 0.5]], dtype=torch.float64)
    (value() * up).sum().backward()
    ratio = w / scale
    inside = (ratio.round() >= -1) & (ratio.round() <= 1)
    slope = torch.where(inside, ratio.round() - ratio, ratio.round().clamp(-1, 1))
    expected = float((up * slope).sum()) * float(term.scale)  # the factor multiplies the first scale
    assert value.scale.factor.grad is not None
    assert float(value.scale.factor.grad) == pytest.approx(expected, rel=1e-6)
    assert value.latent.grad is not None
    assert torch.equal(value.latent.grad[0], up * inside)


def test_scales_alone_have_the_closed_gradient() -> None:
    w = torch.randn(3, 8, dtype=torch.float64)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(4, False, 0))
    scale = Relative(term.scale)
    codes = unpack_codes(term.codes, 4, 8)
    up = torch.randn(1, 3, 8, dtype=torch.float64)
    (decode(codes, scale(), term.zero, term.format, torch.float64) * up).sum().backward()
    whole = codes.double() - term.zero.double()  # type: ignore[union-attr]
    expected = (up * whole).sum(2, keepdim=True) * term.scale
    assert torch.allclose(scale.factor.grad.double(), expected, rtol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("steps", ["learned", "fixed", "range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_codebooks_store_what_they_compute(steps: str, dtype: torch.dtype) -> None:
    w = torch.randn(5, 12).to(dtype)
    term = nf4(w, 8)
    value = RoundedCodebook(term, latent_of(term, w), steps, dtype)
    assert torch.equal(value(), term.dense(dtype))
    moved(value, 1)
    assert torch.equal(value(), value.stored().dense(dtype))
    value().sum().backward()
    assert value.latent.grad is not None
    assert torch.equal(value.latent.grad, torch.ones_like(value.latent))
    assert (value.scale.factor.grad is not None) == (steps == "learned")  # type: ignore[union-attr]


def test_rounded_floats_store_what_they_compute() -> None:
    w = torch.randn(5, 12)
    term = quantize_to_float_term(w, WeightLayout.rows(w.shape), FloatFormat())
    value = RoundedFloat(term, latent_of(term, w), torch.float32)
    assert torch.equal(value(), term.dense(torch.float32))
    moved(value, 1)
    assert torch.equal(value(), value.stored().dense(torch.float32))


def test_a_low_rank_update_starts_at_the_weight_and_keeps_zeros() -> None:
    w = torch.randn(6, 4)
    keep = torch.rand(6, 4) > 0.5
    w *= keep
    value = LowRankUpdate(w, WeightLayout.rows(w.shape), 2, 0.5, keep, torch.Generator().manual_seed(0))
    assert torch.equal(value(), w)
    moved(value, 1)
    assert not torch.equal(value(), w)
    assert not bool((value()[~keep] != 0).any())
    expected = w + 0.5 * (value.u @ value.v) * keep
    assert torch.allclose(value(), expected, atol=1e-6)


def test_numbers_in_half_precision_train_in_full() -> None:
    value = Numbers(torch.randn(4).to(torch.bfloat16))
    assert value.numbers.dtype == torch.float32
    assert value().dtype == torch.bfloat16


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(2, 40), st.integers(0, 10_000))
def test_doubly_quantized_scales(n: int, k: int, seed: int) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 3
    w[0] = 0
    plain = nf4(w, min(8, k))
    term = DoubleQuantizedCodebook.of(plain, w[None])
    assert torch.equal(term.dense(torch.float32), term.expanded().dense(torch.float32))
    assert plain.scale is not None
    spread = float((plain.scale.float() - plain.scale.float().mean()).abs().max())
    assert float((term.scale().float() - plain.scale.float()).abs().max()) <= spread / 14 + 0.01
    assert not bool(term.dense(torch.float32)[0].any())
    again = round_to_codebook(term, w[None])
    assert again.same_as(term)


def test_doubly_quantized_scales_take_half_the_room() -> None:
    plain = nf4(torch.randn(256, 256), 64)
    term = DoubleQuantizedCodebook.of(plain)
    bits = [8 * (t.nbytes - t.table.nbytes) / 256**2 for t in (plain, term)]
    assert bits[0] == pytest.approx(4.25)
    assert bits[1] < 4.13
