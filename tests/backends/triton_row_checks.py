"""Checks of generated work on rows: quantizers, Hadamard transforms, attention over quantized caches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.backends.cpu.cached_form import HalfForm
from fxcompress.backends.triton.attend import append, attend
from fxcompress.backends.triton.cache_form import AttendForm, WriteForm
from fxcompress.backends.triton.launch import run_hadamard, run_quantize
from fxcompress.backends.triton.row_forms import HadamardForm, QuantizeForm
from fxcompress.cache_record import CacheRecord
from fxcompress.formats.floating import FLOAT_DTYPES
from fxcompress.forms.cache import CacheForm
from fxcompress.forms.cache_stores import IntStore
from fxcompress.forms.cache_transforms import HeadRotation, hadamard
from tests.backends.triton_common import (
    DEVICE,
    DTYPES,
    assert_close,
    dtypes,
    few,
    random,
)


@few
@given(
    st.integers(1, 5),
    st.integers(1, 300),
    dtypes,
    st.sampled_from((8, 4, 2)),
    st.sampled_from(("int8", "e4m3", "e5m2")),
)
def check_quantizers(m: int, k: int, dtype: str, bits: int, codes: str) -> None:
    """Codes and scales are the reference's, also of zeros, NaN and infinity; behind a gate and norms."""
    x = random(m, k).to(DTYPES[dtype])
    x[0] = 0
    x[-1, 0] = (float("nan"), float("inf"), 1.0)[k % 3]

    def expected(value: Tensor) -> tuple[Tensor, Tensor]:
        if codes == "int8":
            found: tuple[Tensor, Tensor] = torch.ops.fxcompress.quantize_per_token(value, bits)
            return found
        found = torch.ops.fxcompress.quantize_float_per_token(value, FLOAT_DTYPES[codes])
        return found

    if codes != "int8":  # every code there is, and what lies halfway between two
        every = torch.arange(256, dtype=torch.uint8).view(FLOAT_DTYPES[codes]).float()
        every = every[every.isfinite()].sort().values
        every = torch.cat([every, (every[1:] + every[:-1]) / 2])[None].to(DEVICE)
        q, scale = run_quantize(QuantizeForm("plain", codes, bits, "float32"), every)
        want, _ = expected(every)
        assert scale.item() == 1
        assert torch.equal(q.view(torch.uint8), want.view(torch.uint8))
    q, scale = run_quantize(QuantizeForm("plain", codes, bits, dtype), x)
    want, want_scale = expected(x)
    assert torch.equal(scale, want_scale) or torch.equal(scale.isnan(), want_scale.isnan())
    fine = want_scale.isfinite().flatten()
    assert torch.equal(q[fine].float(), want[fine].float())
    # Behind a gate or norm, in float16: the interpreter drops bits where it makes a bfloat16, devices round.
    x = random(m, k, seed=9).half()
    other, weight, bias = (random(*size, seed=4).half() for size in ((m, k), (k,), (k,)))
    wide = x.float()
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    normal = F.layer_norm(wide, (k,), weight.float(), bias.float(), 1e-5).half()
    for source, others, value in (
        ("gate", (other,), F.silu(x) * other),
        ("rms-norm", (weight,), (wide * root).half() * weight),
        ("layer-norm", (weight, bias), normal),
    ):
        q, scale = run_quantize(QuantizeForm(source, codes, bits, "float16"), x, others, 1e-5)
        want, want_scale = expected(value)
        assert torch.allclose(scale, want_scale, rtol=2e-3, atol=1e-6), (source, codes)
        step = {"int8": 1.05, "e4m3": 33.0, "e5m2": 8193.0}[codes]  # sums in another order: a code at most
        assert bool(((q.float() - want.float()).abs() <= step).all()), (source, codes)


@few
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from((2, 8, 64, 128)))
def check_hadamard(m: int, parts: int, size: int) -> None:
    """The transform of parts of a row."""
    x = random(m, parts * size)
    found = run_hadamard(HadamardForm(size, "float32"), x)
    expected = (x.unflatten(-1, (parts, size)) @ hadamard(size)).flatten(-2)
    assert torch.allclose(found, expected, atol=1e-5)


CACHES = (
    (IntStore(bits=4, axis="channel", group_size=16), IntStore(bits=4, axis="token"), None, "float16"),
    (
        IntStore(bits=2, axis="channel", group_size=16, residual=32, sinks=3),
        IntStore(bits=8, axis="token", residual=20, group_size=16, sinks=3),
        "bool",
        "bfloat16",
    ),
    (
        IntStore(bits=8, axis="token", residual=6, transforms=(HeadRotation(),)),
        IntStore(bits=4, axis="token", residual=2, transforms=(HeadRotation(),)),
        "float",
        "float16",
    ),
    (
        IntStore(bits=4, axis="token", group_size=16),
        IntStore(bits=2, axis="channel", group_size=16),
        None,
        "float16",
    ),
)


def check_caches() -> None:
    """Attention over caches of all kinds while they fill; what is appended equals the reference's bytes."""
    for key, value, mask, dtype in CACHES:
        for width in (32, 48):
            _check_cache(CacheForm(key, value, 1, width, 32), mask, dtype)


def _check_cache(cache: CacheForm, mask: str | None, dtype: str) -> None:
    type_, capacity = DTYPES[dtype], 96
    record = CacheRecord(cache, capacity, type_)
    memory, length = record.allocate(1, DEVICE), torch.zeros(1, dtype=torch.int64)
    form, problem = AttendForm.of(cache, dtype, mask)
    assert form is not None, problem
    halves, widths = (cache.key, cache.value), (cache.key_width, cache.value_width)
    writes = []
    for store, width in zip(halves, widths, strict=True):
        half = HalfForm.of(store)
        assert half is not None
        writes.append(WriteForm(half, width, dtype))
    done = 0
    for new in (37, 1, 2):
        key, value = (random(1, 1, new, width, seed=done).to(type_) for width in widths)
        query = random(1, 3, min(new, 2), cache.key_width, seed=done + 1).to(type_)
        past = record.read(memory, done)
        keys, values = (torch.cat(pair, 2).float() for pair in zip(past, (key, value), strict=True))
        scores, given_mask = query.float() @ keys.transpose(2, 3) * 0.2, None
        if mask == "bool":
            given_mask = random(1, 1, query.shape[2], capacity, seed=done) > -0.5
            scores = scores.masked_fill(~given_mask[..., : done + new], float("-inf"))
        elif mask == "float":
            given_mask = random(1, 3, query.shape[2], capacity, seed=done)
            scores = scores + given_mask[..., : done + new]
        found = attend(form, record, query, key, value, given_mask, memory, length, 0.2, 2)
        assert_close(found, scores.softmax(-1) @ values, dtype, form.title)
        reference = memory.clone()
        record.append(reference, done, key, value)
        append(writes, record, memory, length, (key, value))
        done += new
        assert int(length) == done
        if any(half is not None and half.rotated for half in (form.key, form.value)):
            for one, two in zip(record.read(memory, done), record.read(reference, done), strict=True):
                assert (one.float() - two.float()).abs().max() < 0.4  # a code more or less
        else:
            assert torch.equal(memory, reference), form.title
