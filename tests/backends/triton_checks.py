"""Checks of generated Triton kernels against reference computations, in Triton's interpreter.

Run as a program, because the interpreter has to be chosen before triton is imported:
``TRITON_INTERPRET=1 python -m tests.backends.triton_checks`` prints one JSON object: check → error or null.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.backends.cpu.cached_form import HalfForm
from fxcompress.backends.triton.attend import append, attend
from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.cache_form import AttendForm, WriteForm
from fxcompress.backends.triton.configs import Config, gemv_form
from fxcompress.backends.triton.launch import run_hadamard, run_product, run_quantize
from fxcompress.backends.triton.linear_form import LinearForm
from fxcompress.backends.triton.packing import FloatWordsLayout, WordsLayout, pack_words
from fxcompress.backends.triton.row_forms import HadamardForm, QuantizeForm
from fxcompress.backends.triton.sparse_form import SparseForm, pack_pairs
from fxcompress.cache_record import CacheRecord
from fxcompress.formats import CodebookFormat, IntFormat
from fxcompress.formats.codebook import encode_codebook, fixed_table, largest_magnitudes
from fxcompress.formats.floating import FLOAT_DTYPES, FloatFormat, quantize_to_float_term
from fxcompress.formats.integer import quantize_to_term
from fxcompress.formats.packing import pack_codes
from fxcompress.forms import CodebookWeight, WeightLayout
from fxcompress.forms.cache import CacheForm
from fxcompress.forms.cache_stores import IntStore
from fxcompress.forms.cache_transforms import HeadRotation, hadamard

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CLOSE = {"float16": 2e-3, "bfloat16": 1.5e-2}
few = settings(
    max_examples=int(os.environ.get("FXCOMPRESS_CHECK_EXAMPLES", "10")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
rows, outputs, inputs = st.integers(1, 18), st.integers(1, 40), st.integers(1, 290)
dtypes, flags = st.sampled_from(tuple(DTYPES)), st.booleans()


DEVICE = torch.device(os.environ.get("FXCOMPRESS_CHECK_DEVICE", "cpu"))
"""Where tensors lie: the CPU under the interpreter, ``cuda`` in tests/benchmarks/gpu.py."""


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu").to(DEVICE)


def random_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8, device="cpu").to(DEVICE)


def assert_close(found: Tensor, expected: Tensor, dtype: str, what: object = "") -> None:
    assert found.shape == expected.shape
    error = (found.float() - expected).norm() / expected.norm().clamp_min(1e-20)
    assert error < CLOSE[dtype], f"{what}: {float(error):.2e}"


def config(splits: int = 1, *, scale_weight: bool = False, block_m: int = 16) -> Config:
    return Config(block_m, 32, 32, splits, 4, 2, scale_weight)


def unaligned(x: Tensor) -> Tensor:
    """The same values one element behind an aligned address."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


@few
@given(
    rows,
    outputs,
    inputs,
    st.sampled_from((2, 3, 4, 5, 8)),
    st.sampled_from((0, 20, 32, 48, 64, 128)),
    dtypes,
    flags,
    flags,
)
def check_codes(m: int, n: int, k: int, bits: int, group: int, dtype: str, zero: bool, flag: bool) -> None:
    """W{2…8}A16: groups that do not divide, splits, biases, scales before and after, unaligned rows."""
    group = group if group <= k else 0
    w = random(n, k)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(bits, not zero, group))
    scale = ("group", group, "bfloat16") if group else ("row", 0, "float32")
    form = LinearForm("int", bits, zero, *scale, dtype, bias=flag)
    packed = WordsLayout(form.word, form.step).pack([term])
    x, bias = random(m, k, seed=1).to(DTYPES[dtype]), random(n, seed=2).to(DTYPES[dtype])
    expected = x.float() @ term.dense(torch.float32).T + (bias.float() if flag else 0)
    tensors = {**packed, "bias": bias}
    for splits, weight in ((1, False), (1, True), (3, flag)):
        found = run_product(form, config(splits, scale_weight=weight), unaligned(x), tensors, n)
        assert_close(found, expected, dtype, (form.title, splits, weight))
    single = gemv_form(form)
    assert single is not None
    found = run_product(single, config(2), x[:1], tensors, n)
    assert_close(found, expected[:1], dtype, single.title)


@few
@given(rows, outputs, inputs, st.sampled_from((2, 3, 4)), st.sampled_from((0, 32, 64, 128)), dtypes, flags)
def check_codes_with_bytes(m: int, n: int, k: int, bits: int, group: int, dtype: str, zero: bool) -> None:
    """W4A8 and its relatives: exact sums."""
    group = group if group <= k else 0
    w = random(n, k)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(bits, not zero, group))
    scale = ("group", group, "bfloat16") if group else ("row", 0, "float32")
    form = LinearForm("int", bits, zero, *scale, dtype, "int8")
    packed = WordsLayout(form.word, form.step).pack([term])
    q, x_scale = torch.ops.fxcompress.quantize_per_token(random(m, k, seed=1), 8)
    found = run_product(form, config(), q, {**packed, "x_scale": x_scale}, n)
    assert_close(found, (q.float() * x_scale) @ term.dense(torch.float32).T, dtype, form.title)


@few
@given(rows, outputs, inputs, st.sampled_from((0, 16, 64)), dtypes, flags)
def check_tables(m: int, n: int, k: int, group: int, dtype: str, per_row: bool) -> None:
    """NF4 with groups, and a table for every row."""
    w = random(n, k)
    if per_row:
        table = random(1, n, 8).to(torch.bfloat16).sort(-1).values
        codes, scale, bits, group = encode_codebook(w[None], table, None, 0), None, 3, 0
    else:
        bits, table = 4, fixed_table("nf4")[None, None]
        scale = largest_magnitudes(w[None], CodebookFormat(4, group, per_row=False))
        codes = encode_codebook(w[None], table, scale, group)
    term = CodebookWeight(bits, group, (n, k), (0, 1), 0, 1, pack_codes(codes, bits), table, scale)
    how = ("none", 0) if scale is None else ("group", group) if group else ("row", 0)
    form = LinearForm(
        "row-table" if per_row else "table", bits, False, *how, "bfloat16" if group else "float32", dtype
    )
    x = random(m, k, seed=1).to(DTYPES[dtype])
    packed = WordsLayout(form.word, form.step).pack([term])
    found = run_product(form, config(2), x, packed, n)
    assert_close(found, x.float() @ term.dense(torch.float32).T, dtype, form.title)


@few
@given(rows, outputs, inputs, st.sampled_from(("e4m3", "e5m2")), dtypes, flags, flags)
def check_small_floats(m: int, n: int, k: int, kind: str, dtype: str, emulated: bool, blocks: bool) -> None:
    """FP8 weights with float activations; FP8 × FP8 per channel and in blocks, native and emulated."""
    w = random(n, k)
    term = quantize_to_float_term(w, WeightLayout.rows(w.shape), FloatFormat(kind))
    form = LinearForm(kind, 8, False, "row", 0, "float32", dtype)
    x = random(m, k, seed=1).to(DTYPES[dtype])
    packed = FloatWordsLayout(form.word, form.step).pack([term])
    assert_close(run_product(form, config(), x, packed, n), x.float() @ term.dense(torch.float32).T, dtype)
    blocked = FloatFormat(kind, 128, 128) if blocks else FloatFormat(kind)
    term = quantize_to_float_term(w, WeightLayout.rows(w.shape), blocked)
    size = 32 if blocks else 0
    q, x_scale = float_groups(x.float(), kind, size or k)
    both = BytesForm(kind, False, 128 if blocks else 1, 128 if blocks else 0, size, dtype, False, emulated)
    tensors = {"w": term.codes[0], "scale": term.scale[0].t().contiguous(), "x_scale": x_scale}
    value = q.float() * x_scale.repeat_interleave(size or k, 1)[:, :k]
    found = run_product(both, config(), q, tensors, n)
    assert_close(found, value @ term.dense(torch.float32).T, dtype, both.title)


def float_groups(x: Tensor, kind: str, size: int) -> tuple[Tensor, Tensor]:
    """8-bit floats of groups of inputs, and their scales."""
    width = x.shape[1]
    wide = F.pad(x, (0, -width % size)).unflatten(1, (-1, size))
    q, scale = torch.ops.fxcompress.quantize_float_per_token(wide, FLOAT_DTYPES[kind])
    return q.flatten(1)[:, :width].contiguous(), scale.squeeze(-1)


@few
@given(rows, outputs, inputs, st.sampled_from((0, 32, 64)), dtypes, flags)
def check_bytes(m: int, n: int, k: int, group: int, dtype: str, zero: bool) -> None:
    """W8A8: zero-points, groups, biases."""
    from fxcompress.backends.triton.packing import BytesLayout

    group = group if group <= k else 0
    w = random(n, k)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(8, not zero, group))
    packed = BytesLayout().pack([term])
    q, x_scale = torch.ops.fxcompress.quantize_per_token(random(m, k, seed=1), 8)
    bias = random(n, seed=3).to(DTYPES[dtype])
    form = BytesForm("int8", zero, 1, group, 0, dtype, True)
    tensors = {"w": packed["values"], "scale": packed["scale"], "x_scale": x_scale, "bias": bias}
    tensors.update({"zero": packed["zero"]} if zero else {})
    expected = (q.float() * x_scale) @ term.dense(torch.float32).T + bias.float()
    assert_close(run_product(form, config(), q, tensors, n), expected, dtype, form.title)


@few
@given(rows, outputs, st.integers(1, 8), dtypes, st.sampled_from(("e2m1-e8m0", "e2m1-e4m3", "e4m3-e8m0")))
def check_block_formats(m: int, n: int, blocks: int, dtype: str, kind: str) -> None:
    """MXFP4, NVFP4 and MXFP8 by emulation: codes with small scales per block."""
    values, scale_dtype = kind.split("-")
    group, k = (16 if scale_dtype == "e4m3" else 32), blocks * 32
    bits = 4 if values == "e2m1" else 8
    codes = random_codes(n, k, bits=bits)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN of e4m3
    plain = _E2M1.to(DEVICE)[codes.long()] if bits == 4 else codes.view(torch.float8_e4m3fn).float()
    raw = random_codes(k // group, n, bits=4) + 110
    tensors = {"words": torch.empty(0), "scale": raw}
    if scale_dtype == "e4m3":
        raw = raw - 70  # moderate positive values
        tensors = {"words": torch.empty(0), "scale": raw, "tensor_scale": torch.tensor([0.37])}
        scale = raw.view(torch.float8_e4m3fn).float() * 0.37
    else:
        scale = torch.exp2(raw.float() - 127)
    form = LinearForm(values, bits, False, "group", group, scale_dtype, dtype)
    tensors["words"] = pack_words(codes, form.stored_bits, form.word, form.step)
    x = random(m, k, seed=1).to(DTYPES[dtype])
    expected = x.float() @ (plain * scale.T.repeat_interleave(group, 1)).T
    assert_close(run_product(form, config(), x, tensors, n), expected, dtype, form.title)


_E2M1 = torch.tensor([s * v for s in (1, -1) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])


@few
@given(
    rows, outputs, st.integers(1, 70), dtypes, st.sampled_from((16, 8, 4)), st.sampled_from((0, 128)), flags
)
def check_2_of_4(m: int, n: int, quads: int, dtype: str, bits: int, group: int, zero: bool) -> None:
    """2:4: floats, and codes with zero-points and groups."""
    k = 4 * quads
    order = random(n, quads, 4, seed=5).argsort(-1)
    stored = (order < 2).flatten(1)
    x = random(m, k, seed=1).to(DTYPES[dtype])
    if bits == 16:
        dense = torch.where(stored, random(n, k), 0.0).to(DTYPES[dtype])
        form, tensors, value = SparseForm(16, False, 0, dtype), pack_pairs(dense, stored, 16), dense.float()
    else:
        group = group if group <= k else 0
        codes = random_codes(n, k, bits=bits)
        form, tensors = SparseForm(bits, zero, group, dtype), pack_pairs(codes, stored, bits)
        groups = -(-k // group) if group else 1
        scale = random(groups, n, seed=7).abs().to(torch.bfloat16 if group else torch.float32)
        zeros = random_codes(groups, n, bits=bits, seed=1)
        tensors["scale"] = scale
        tensors.update({"zero": zeros} if zero else {})
        offset = zeros.float() if zero else torch.full((groups, n), float(1 << (bits - 1)))
        spread = [t.float().T.repeat_interleave(group or k, 1)[:, :k] for t in (scale, offset)]
        value = torch.where(stored, (codes.float() - spread[1]) * spread[0], 0.0)
        if (
            zero
        ):  # an empty place of a pair is the code 2**(bits-1), which is no zero then: both must be stored
            assert bool((stored.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert_close(run_product(form, config(2), x, tensors, n), x.float() @ value.T, dtype, form.title)


@few
@given(rows, outputs, inputs, dtypes, st.integers(1, 20), flags)
def check_second_terms(m: int, n: int, k: int, dtype: str, count: int, splits: bool) -> None:
    """Outlier columns and low-rank factors, added by the kernel of the dense codes."""
    w, count = random(n, k), min(count, k)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(4, False, 0))
    scale = ("row", 0, "float32")
    x = random(m, k, seed=1).to(DTYPES[dtype])
    dense = x.float() @ term.dense(torch.float32).T
    columns = random(k, seed=2).argsort()[:count].sort().values
    values = random(n, count, seed=3).to(DTYPES[dtype])
    form = LinearForm("int", 4, True, *scale, dtype, outliers=True)
    packed = WordsLayout(form.word, form.step).pack([term])
    how = config(3 if splits else 1)
    found = run_product(form, how, x, {**packed, "columns": columns, "values": values}, n)
    assert_close(found, dense + x[:, columns].float() @ values.float().T, dtype, form.title)
    v, u = random(count, k, seed=4).to(DTYPES[dtype]), random(n, count, seed=5).to(DTYPES[dtype])
    form = LinearForm("int", 4, True, *scale, dtype, rank=16 if count <= 16 else 32)
    found = run_product(form, how, x, {**packed, "v": v, "u": u}, n)
    assert_close(found, dense + (x.float() @ v.float().T) @ u.float().T, dtype, form.title)


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


CHECKS: dict[str, Callable[[], Any]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def main() -> None:
    """Run all checks, or those named."""
    found: dict[str, str | None] = {}
    if DEVICE.type != "cpu":
        torch.set_default_device(DEVICE)
    for name in sys.argv[1:] or CHECKS:
        try:
            CHECKS[name]()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
