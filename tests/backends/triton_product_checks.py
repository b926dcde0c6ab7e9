"""Checks of generated products: codes, tables, floats, 2:4, second terms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.launch import run_product
from fxcompress.backends.triton.linear_form import LinearForm
from fxcompress.backends.triton.packing import FloatWordsLayout, WordsLayout, pack_words
from fxcompress.backends.triton.sparse_form import SparseForm, pack_pairs
from fxcompress.formats import CodebookFormat, IntFormat
from fxcompress.formats.codebook import encode_codebook, fixed_table, largest_magnitudes
from fxcompress.formats.floating import FLOAT_DTYPES, FloatFormat, quantize_to_float_term
from fxcompress.formats.integer import quantize_to_term
from fxcompress.formats.packing import pack_codes
from fxcompress.forms import CodebookWeight, WeightLayout
from tests.backends.triton_common import (
    DEVICE,
    DTYPES,
    assert_close,
    config,
    dtypes,
    few,
    flags,
    inputs,
    outputs,
    random,
    random_codes,
    rows,
    unaligned,
    unpacked,
)


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
    packed = WordsLayout().pack([term])
    x, bias = random(m, k, seed=1).to(DTYPES[dtype]), random(n, seed=2).to(DTYPES[dtype])
    expected = x.float() @ term.dense(torch.float32).T + (bias.float() if flag else 0)
    tensors = {**packed, "bias": bias}
    for splits, weight in ((1, False), (1, True), (3, flag)):
        found = run_product(form, config(splits, scale_weight=weight, form=form), unaligned(x), tensors, n)
        assert_close(found, expected, dtype, (form.title, splits, weight))
    found = run_product(form, unpacked(form), x, tensors, n)
    assert_close(found, expected, dtype, (form.title, "unpacked"))


@few
@given(rows, outputs, inputs, st.sampled_from((2, 3, 4)), st.sampled_from((0, 32, 64, 128)), dtypes, flags)
def check_codes_with_bytes(m: int, n: int, k: int, bits: int, group: int, dtype: str, zero: bool) -> None:
    """W4A8 and its relatives: exact sums."""
    group = group if group <= k else 0
    w = random(n, k)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(bits, not zero, group))
    scale = ("group", group, "bfloat16") if group else ("row", 0, "float32")
    form = LinearForm("int", bits, zero, *scale, dtype, "int8")
    packed = WordsLayout().pack([term])
    q, x_scale = torch.ops.fxcompress.quantize_per_token(random(m, k, seed=1), 8)
    expected = (q.float() * x_scale) @ term.dense(torch.float32).T
    for how in (config(form=form), unpacked(form)):
        found = run_product(form, how, q, {**packed, "x_scale": x_scale}, n)
        assert_close(found, expected, dtype, (form.title, how.unpacked))


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
    packed = WordsLayout().pack([term])
    found = run_product(form, config(2, form=form), x, packed, n)
    assert_close(found, x.float() @ term.dense(torch.float32).T, dtype, form.title)


@few
@given(rows, outputs, inputs, st.sampled_from(("e4m3", "e5m2")), dtypes, flags, flags)
def check_small_floats(m: int, n: int, k: int, kind: str, dtype: str, emulated: bool, blocks: bool) -> None:
    """FP8 weights with float activations; FP8 × FP8 per channel and in blocks, native and emulated."""
    w = random(n, k)
    term = quantize_to_float_term(w, WeightLayout.rows(w.shape), FloatFormat(kind))
    form = LinearForm(kind, 8, False, "row", 0, "float32", dtype)
    x = random(m, k, seed=1).to(DTYPES[dtype])
    packed = FloatWordsLayout().pack([term])
    assert_close(
        run_product(form, config(form=form), x, packed, n), x.float() @ term.dense(torch.float32).T, dtype
    )
    blocked = FloatFormat(kind, 128, 128) if blocks else FloatFormat(kind)
    term = quantize_to_float_term(w, WeightLayout.rows(w.shape), blocked)
    size = 32 if blocks else 0
    q, x_scale = float_groups(x.float(), kind, size or k)
    both = BytesForm(kind, False, 128 if blocks else 1, 128 if blocks else 0, size, dtype, False, emulated)
    tensors = {"w": term.codes[0], "scale": term.scale[0].t().contiguous(), "x_scale": x_scale}
    value = q.float() * x_scale.repeat_interleave(size or k, 1)[:, :k]
    found = run_product(both, config(block_k=32), q, tensors, n)
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
    assert_close(run_product(form, config(block_k=32), q, tensors, n), expected, dtype, form.title)


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
    tensors["words"] = pack_words(codes, form.stored_bits)
    x = random(m, k, seed=1).to(DTYPES[dtype])
    expected = x.float() @ (plain * scale.T.repeat_interleave(group, 1)).T
    assert_close(run_product(form, config(form=form), x, tensors, n), expected, dtype, form.title)


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
    packed = WordsLayout().pack([term])
    how = config(3 if splits else 1, form=form)
    found = run_product(form, how, x, {**packed, "columns": columns, "values": values}, n)
    assert_close(found, dense + x[:, columns].float() @ values.float().T, dtype, form.title)
    v, u = random(count, k, seed=4).to(DTYPES[dtype]), random(n, count, seed=5).to(DTYPES[dtype])
    form = LinearForm("int", 4, True, *scale, dtype, rank=16 if count <= 16 else 32)
    found = run_product(form, how, x, {**packed, "v": v, "u": u}, n)
    assert_close(found, dense + (x.float() @ v.float().T) @ u.float().T, dtype, form.title)
