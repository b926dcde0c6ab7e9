"""What decides about generated Triton kernels before a device runs one: forms, packing, choices, lowering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import fxcompress.backends.triton.operators  # noqa: F401  (registers the operators)
from fxcompress.backends.cpu.cached_form import HalfForm
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.cache_form import AttendForm, WriteForm
from fxcompress.backends.triton.configs import Config, Shape, best, candidates, cost, row_bucket, shared_bytes
from fxcompress.backends.triton.devices import KNOWN, Device, from_properties
from fxcompress.backends.triton.generator import render
from fxcompress.backends.triton.launch import run_product
from fxcompress.backends.triton.linear_form import LinearForm, UnpackForm
from fxcompress.backends.triton.packing import pack_words, unpack_words
from fxcompress.backends.triton.row_forms import HadamardForm, QuantizeForm
from fxcompress.backends.triton.selection import choose_kernel
from fxcompress.backends.triton.sparse_form import SparseForm, dense_pairs, pack_pairs
from fxcompress.backends.triton.texts import form_of, text_of
from fxcompress.backends.triton.tuning import Choices
from fxcompress.errors import BackendError

ROOT = Path(__file__).parents[2]
H100 = next(device for device in KNOWN if device.name == "H100")
A100 = next(device for device in KNOWN if device.name == "A100")
W4 = LinearForm("int", 4, True, "group", 128, "bfloat16", "float16")
TOKENS = HalfForm(4, "token", 0, 0, 1, 0, False)
FORMS = (
    W4,
    LinearForm("int", 3, False, "row", 0, "float32", "bfloat16", "int8"),
    LinearForm("e2m1", 4, False, "group", 16, "e4m3", "float16"),
    BytesForm("e4m3", False, 128, 128, 128, "bfloat16", emulated=True),
    SparseForm(8, True, 128, "float16", True),
    QuantizeForm("rms-norm", "int8", 8, "bfloat16"),
    HadamardForm(64, "float16"),
)


def spec(bits: int = 4, group: int = 128, **fields: object) -> LinearSpec:
    made = LinearSpec(bits, False, group, 4096, 4096, None, 1, torch.float16)
    return replace(made, **fields)  # type: ignore[arg-type]


@given(st.sampled_from((2, 3, 4, 8)), st.integers(1, 5), st.integers(1, 300))
def test_words_hold_every_code(bits: int, rows: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    packed = pack_words(codes, bits)
    assert torch.equal(unpack_words(packed, bits, rows, columns), codes)
    padded = -(-columns // LinearForm.chunk) * LinearForm.chunk
    assert packed.numel() * 32 == 64 * padded * bits


@given(st.integers(1, 4), st.integers(1, 80), st.sampled_from((4, 8, 16)))
def test_pairs_hold_every_entry(rows: int, quads: int, bits: int) -> None:
    stored = (torch.rand(rows, quads, 4).argsort(-1) < 2).flatten(1)
    entries = torch.randint(1, 1 << min(bits, 8), (rows, 4 * quads), dtype=torch.uint8)
    if bits == 16:
        entries = entries.half()
    packed = pack_pairs(entries * stored.to(entries.dtype), stored, bits)
    dense, has = dense_pairs([packed["pairs"], packed["places"]], bits, 4 * quads)
    raw = entries.view(torch.int16) if bits == 16 else entries
    assert torch.equal(has, stored)
    assert torch.equal(dense[stored], raw[stored].long() & ((1 << bits) - 1))


def test_more_than_two_entries_in_a_quad_are_refused() -> None:
    with pytest.raises(BackendError, match="more than two"):
        pack_pairs(torch.ones(1, 4).half(), torch.ones(1, 4, dtype=torch.bool), 16)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.title)
def test_forms_survive_as_text_and_render_alike(form: object) -> None:
    again = form_of(text_of(form))
    assert again == form
    assert render(again) == render(form)  # type: ignore[type-var]
    assert "{{" not in render(form)  # type: ignore[type-var]
    compile(render(form), "generated", "exec")  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(W4, bits=9), "bits=9"),
        (lambda: replace(W4, values="e4m3"), "bits=4"),
        (lambda: replace(W4, group=0), "group=0"),
        (lambda: replace(W4, input="float32"), "float32"),
        (lambda: replace(W4, activation="int8", group=48), "group=48"),
        (lambda: replace(W4, rank=20), "rank=20"),
        (lambda: UnpackForm(**{**vars(W4), "rank": 16}), "only the weight itself"),
        (lambda: BytesForm("int8", False, 1, 48, 0, "float16"), "group=48"),
        (lambda: BytesForm("e4m3", True, 1, 0, 0, "float16"), "zero=True"),
        (lambda: SparseForm(8, False, 64, "float16"), "group=64"),
        (lambda: HadamardForm(48, "float16"), "power of two"),
        (lambda: AttendForm(TOKENS, replace(TOKENS, sinks=4), 64, 64, "float16", None), "first tokens"),
        (lambda: WriteForm(HalfForm(3, "token", 0, 0, 1, 0, False), 64, "float16"), "3 bits"),
        (
            lambda: AttendForm(*[HalfForm(4, "token", 0, 0, 1, 0, False)] * 2, 64, 64, "float32", None),
            "float32",
        ),
    ],
)
def test_forms_without_a_kernel_are_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        make()  # type: ignore[operator]


@given(
    st.sampled_from((W4, *FORMS[1:5])),
    st.sampled_from((1, 16, 64, 256, 4096)),
    st.integers(16, 30000),
    st.integers(16, 30000),
    st.sampled_from(KNOWN),
)
def test_choices_fit_the_device(form: object, m: int, n: int, k: int, device: Device) -> None:
    shape = Shape(m, n, k)
    config = best(form, shape, device)  # type: ignore[arg-type]
    assert shared_bytes(form, config) <= device.shared  # type: ignore[arg-type]
    assert config == best(form, shape, device)  # type: ignore[arg-type]
    assert all(cost(form, other, shape, device) > 0 for other in candidates(form, shape, device))  # type: ignore[arg-type]


def test_the_model_of_cost_prefers_what_the_rates_ask_for() -> None:
    single = best(W4, Shape(1, 4096, 4096), H100)
    many = best(W4, Shape(4096, 4096, 4096), H100)
    assert single.block_m <= 16
    assert single.splits > 1, "32 blocks of outputs leave most of 132 processors without work"
    assert many.unpacked, "once for 4096 rows costs less than once for every 128 of them"
    assert not best(replace(W4, rank=16), Shape(4096, 4096, 4096), H100).unpacked
    assert cost(W4, single, Shape(1, 4096, 4096), H100) < cost(W4, single, Shape(1, 4096, 4096), A100)
    wide = LinearForm("int", 8, True, "group", 128, "bfloat16", "float16")
    shape = Shape(1, 8192, 28672)
    assert cost(W4, best(W4, shape, H100), shape, H100) < cost(wide, best(wide, shape, H100), shape, H100)


@given(st.integers(1, 1 << 20))
def test_rows_are_rounded_up_to_a_bucket(rows: int) -> None:
    bucket = row_bucket(rows)
    assert bucket >= min(rows, 4096)
    assert row_bucket(bucket) == bucket


def test_devices_are_found_by_name_or_estimated() -> None:
    assert from_properties("NVIDIA H100 80GB HBM3", 90, 132) == H100
    assert from_properties("NVIDIA A100-SXM4-40GB", 80, 108).bandwidth == 1555e9
    unknown = from_properties("NVIDIA Something New", 90, 100)
    assert unknown.serves
    assert unknown.small_floats
    assert not from_properties("NVIDIA Tesla V100", 70, 80).serves


def test_measured_choices_are_kept_and_damaged_files_are_ignored(tmp_path: Path) -> None:
    choices, shape = Choices(H100, tmp_path), Shape(16, 4096, 4096)
    assert choices.get(W4, shape) is None
    config = Config(16, 64, 128, 2, 4, 3)
    choices.put(W4, shape, config, 1e-5)
    assert Choices(H100, tmp_path).get(W4, shape) == config
    assert Choices(A100, tmp_path).get(W4, shape) is None
    fresh = Choices(H100, tmp_path / "none", shipped=tmp_path)  # a file that came with the package
    assert fresh.get(W4, shape) == config
    fresh.put(W4, shape, other := Config(16, 32, 128, 2, 4, 3), 9e-6)
    assert fresh.get(W4, shape) == other
    assert json.loads(fresh.path.read_text()).keys() == json.loads(choices.path.read_text()).keys()
    choices.path.write_text("{", encoding="utf-8")
    assert Choices(H100, tmp_path).get(W4, shape) is None


@pytest.mark.parametrize(
    ("use", "device", "expected"),
    [
        (spec(), H100, "linear-w4zg128"),
        (spec(tokens=None), H100, "unpacked"),
        (spec(activation="dynamic"), H100, "aint8"),
        (spec(8, 0, activation="dynamic"), A100, "bytes-int8z"),
        (spec(4, 48, activation="dynamic"), H100, "no product of bytes"),
        (spec(8, 0, activation="static"), H100, "static scales"),
        (spec(table="shared", symmetric=True), H100, "linear-t4g128"),
        (spec(dtype=torch.float32), H100, "float32"),
        (spec(), from_properties("NVIDIA Tesla V100", 70, 80), "below 8.0"),
        (spec(rows=1 << 24), H100, "outputs, more than"),
    ],
)
def test_every_use_has_a_kernel_or_a_reason(use: LinearSpec, device: Device, expected: str) -> None:
    _, text = choose_kernel(use, device)
    assert expected in text


def test_tensors_on_another_device_and_strided_ones_are_refused() -> None:
    x, config = torch.zeros(1, 128, dtype=torch.float16), Config(16, 32, 128, 1, 4, 2)
    words = torch.zeros(16, 8, dtype=torch.int32)
    tensors = {"words": words, "scale": torch.zeros(1, 8, device="meta"), "zero": torch.zeros(1, 8)}
    with pytest.raises(BackendError, match="scale lies on meta"):
        run_product(W4, config, x, tensors, 8)
    with pytest.raises(BackendError, match="not contiguous"):
        run_product(W4, config, x, {"words": torch.zeros(8, 16, dtype=torch.int32).t()}, 8)


def test_without_triton_everything_imports_and_says_what_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys, pkgutil, importlib; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import fxcompress.backends.triton as package\n"
        "for found in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'fxcompress.backends.triton.{found.name}')\n"
        "from tests.backends.test_triton_host import H100, W4, choose_kernel, spec\n"
        "from fxcompress.backends.triton.generator import load_kernel, render\n"
        "assert 'tl.dot' in render(W4)\n"
        "print(choose_kernel(spec(), H100))\n"
        "try:\n    load_kernel(W4)\nexcept Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("triton is not installed") == 2


def test_operators_have_shapes_on_devices_that_are_not_there() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 128, dtype=torch.float16, device="cuda")
        tensors = [
            torch.empty(16, 40, dtype=torch.int32, device="cuda"),
            torch.empty(1, 40, dtype=torch.bfloat16, device="cuda"),
            torch.empty(1, 40, dtype=torch.uint8, device="cuda"),
        ]
        y = torch.ops.fxcompress_triton.linear(x, tensors, 40, text_of(W4))
        assert (tuple(y.shape), y.dtype, y.device.type) == ((2, 3, 40), torch.float16, "cuda")
        q, scale = torch.ops.fxcompress_triton.quantize(
            x, [], 0.0, text_of(QuantizeForm("plain", "e4m3", 8, "float16"))
        )
        assert (q.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, (2, 3, 1))


def test_products_with_outlier_columns_are_written_apart() -> None:
    from fxcompress.backends.triton.patterns import join_terms, separate_outliers

    graph = fx.Graph()
    x, codes, scale, columns, values = (graph.placeholder(name) for name in ("x", "c", "s", "o", "v"))
    ops, aten = torch.ops.fxcompress, torch.ops.aten
    shapes = {x: (3, 16), columns: (2,), values: (8, 2)}
    for node, shape in shapes.items():
        node.meta["val"] = torch.empty(shape, device="meta")
    dense = graph.call_function(
        ops.dequantize_weight.default, (codes, scale, None, 4, 0, [8, 16], [0, 1], 0, 1, torch.float32)
    )
    empty = graph.call_function(aten.new_zeros.default, (values, [8, 16]))
    placed = graph.call_function(aten.index_copy.default, (empty, -1, columns, values))
    weight = graph.call_function(aten.add.Tensor, (dense, placed))
    product = graph.call_function(aten.linear.default, (x, weight))
    product.meta["val"] = torch.empty(3, 8, device="meta")
    graph.output(product)
    assert separate_outliers(graph) == 1
    total = next(iter(graph.find_nodes(op="output"))).args[0]
    joined = join_terms(total)
    assert joined is not None
    assert joined.tensors == {"columns": columns, "values": values}


def test_a_model_runs_on_the_kernels_in_the_interpreter(tmp_path: Path) -> None:
    """The whole way from a recipe to kernels: what is chosen, and what is computed, against the reference."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "FXCOMPRESS_TARGET": "triton",
        "FXCOMPRESS_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.backends.triton_models"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    cache = found.pop("cache")
    assert cache["error"] < 2e-3
    assert cache["fused"] == 1
    assert cache["same memory"]
    for name, row in found.items():
        assert row["error"] < 5e-3, (name, row)
        assert any(row["kernel"] in kernel for kernel in row["kernels"]), (name, row["kernels"])
    quantized = found["w8a8"]["kernels"]
    assert "quantize-gate-int88-float16" in quantized
    assert "quantize-rms-norm-int88-float16" in quantized
    assert "quantize-layer-norm-int88-float16" in quantized
    assert all(
        "triton" in text for row in found.values() for text in row["choices"].values() if "factor" not in text
    )
