"""ONNX export: every form as the operators it should become, equal to the reference, and its bad inputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.backends.onnx import parity
from fxcompress.backends.onnx.saving import EXTERNAL_THRESHOLD
from fxcompress.errors import ArtifactError, BackendError
from tests.backends.onnx_models import Classifier, Perceptron, Pictures, compressed, enlivened, run

IDS = torch.arange(24).reshape(2, 12) * 7 % 50
ROWS = torch.linspace(-2, 2, 2 * 5 * 96).reshape(2, 5, 96).sin()
PICTURES = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12).sin()

QUANTIZE = "quantize-weights"
STATIC = [{QUANTIZE: {"bits": 8, "group_size": 0}}, {"quantize-activations": {"mode": "static"}}]


def weights(**options: Any) -> list[Any]:
    return [{QUANTIZE: options}]


CASES: dict[str, tuple[Any, set[str], set[str]]] = {
    # recipe, kernels ONNX Runtime must run for it, kernels it must not
    "int4": (weights(bits=4, group_size=32), {"MatMulNBits"}, {"MatMul", "Gemm"}),
    "int3": (weights(bits=3, group_size=16), {"MatMulNBits"}, {"MatMul"}),
    "int5, groups of 48": (weights(bits=5, group_size=48), {"MatMulNBits"}, {"MatMul"}),
    "int8 per row": (weights(bits=8, group_size=0), {"MatMulNBits"}, {"MatMul"}),
    "int4, groups of 10": (weights(bits=4, group_size=10), {"DequantizeLinear", "MatMul"}, {"MatMulNBits"}),
    "dynamic": ("w8a8", {"MatMulIntegerToFloat"}, {"MatMul", "MatMulNBits"}),
    "static": (STATIC, {"MatMulIntegerToFloat", "QuantizeLinear"}, {"MatMul"}),
    "int4 weights, int8 activations": ("w4a8", {"MatMulNBits", "Round"}, {"MatMul"}),
    "fp8": ("fp8", {"DequantizeLinear", "Cast"}, set()),
    "fp8 static": ("fp8-static", {"DequantizeLinear", "Cast"}, {"QuantizeLinear"}),
    "clusters": ("w8a8-reorder", {"QuantizeLinear", "Gather"}, set()),
    "fewer channels": (
        [{"prune-channels": {"amount": 0.25, "importance": "l1"}}, *weights(bits=4, group_size=16)],
        {"MatMulNBits"},
        set(),
    ),
    "factors": ("svd-llm-20", {"MatMul"}, {"MatMulNBits"}),
    "int8 factors": ("svd-llm-20-w8a16", {"MatMulNBits"}, {"MatMul"}),
    "factors of the error of int4": ("w4a16-eora", {"MatMulNBits"}, {"MatMul"}),
    "factors, dynamic": (
        [{"svd-llm": {"keep": 0.8}}, *weights(bits=8, group_size=0), "quantize-activations"],
        {"MatMulIntegerToFloat", "MatMulNBits"},  # what the first factor gives is not rounded again
        {"MatMul"},
    ),
    "outliers found in every call": ("w8a8-outlier-split", {"MatMulNBits", "Round"}, set()),
}


@pytest.fixture(scope="module")
def small() -> fxcompress.CompressedModel:
    return compressed(Perceptron().eval(), "w4a16", ROWS)


@pytest.mark.parametrize("name", CASES)
def test_every_form_becomes_its_operators_and_computes_the_same(name: str, tmp_path: Path) -> None:
    recipe, expected, forbidden = CASES[name]
    small = compressed(Perceptron().eval(), recipe, ROWS)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS)
    kernels = set(report.kernels)
    assert expected <= kernels, report
    assert not forbidden & kernels, report
    assert {p.inputs for p in report.parity} == {"example inputs", "random inputs", "other sizes"}
    small.set_backend("eager")
    other = torch.randn(3, 7, 96)  # sizes that no example had
    (found,) = run(tmp_path / "m.onnx", x=other)
    want = small(other)
    assert (found - want).norm() <= 0.03 * want.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_portable_files_hold_only_standard_operators(bits: int, tmp_path: Path) -> None:
    small = compressed(Perceptron().eval(), weights(bits=bits, group_size=32), ROWS)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS, target="portable")
    model = onnx.load(tmp_path / "m.onnx")
    assert [opset.domain for opset in model.opset_import] == [""]
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert (onnx.TensorProto.UINT4 if bits == 4 else onnx.TensorProto.INT8) in kinds
    assert max(p.relative for p in report.parity) < 0.03


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
def test_a_tied_table_is_stored_once(recipe: str, tmp_path: Path) -> None:
    model = Classifier().eval()
    small = compressed(model, recipe, IDS)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=IDS)
    words = model.table.num_embeddings
    stored = [
        tensor
        for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer
        if tensor.dims[:1] == [words] or tensor.dims[1:] == [words]
    ]
    codes = [t for t in stored if t.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)]
    assert len(codes) == 1, [(t.name, t.dims) for t in stored]
    assert all(p.kl is not None and p.kl < 0.005 for p in report.parity)


def test_the_newest_opset(tmp_path: Path) -> None:
    small = compressed(Classifier().eval(), "w4a16", IDS)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=IDS, opset=24)
    assert report.opset == onnx.load(tmp_path / "m.onnx").opset_import[0].version == 24


def test_convolutions_between_quantizers_run_as_integers(tmp_path: Path) -> None:
    model = enlivened(Pictures())
    small = compressed(model, STATIC, PICTURES)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=PICTURES)
    assert report.kernels.get("QLinearConv", 0) >= 2, report
    assert "BatchNormalization" not in report.kernels
    assert max(p.relative for p in report.parity) < 0.02


def test_products_of_matrices_with_a_bias_run_as_integers(tmp_path: Path) -> None:
    rows = ROWS.flatten(0, 1)
    report = compressed(Perceptron().eval(), STATIC, rows).export_onnx(
        tmp_path / "m.onnx", example_inputs=rows
    )
    assert report.kernels["QGemm"] == 1, report
    assert max(p.relative for p in report.parity) < 0.01


class Normalised(nn.Module):
    """A root-mean-square normalisation in front of a linear, as decoders spell it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 96))
        self.linear = nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


def test_normalisations_run_as_one_kernel(tmp_path: Path) -> None:
    small = compressed(Normalised().eval(), "w8a16", ROWS)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS)
    assert report.kernels == {"MatMulNBits": 1, "SimplifiedLayerNormalization": 1}


def test_weights_of_convolutions_stay_quantized(tmp_path: Path) -> None:
    small = compressed(enlivened(Pictures()), weights(bits=8), PICTURES)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=PICTURES)
    assert max(p.relative for p in report.parity) < 0.02
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert kinds["second.weight.codes"] == onnx.TensorProto.INT8


def test_files_are_deterministic_checked_and_free_of_paths(
    small: fxcompress.CompressedModel, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        small.export_onnx(tmp_path / name / "m.onnx", example_inputs=ROWS)
    content = (tmp_path / "a" / "m.onnx").read_bytes()
    assert content == (tmp_path / "b" / "m.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert b"site-packages" not in content
    model = onnx.load(tmp_path / "a" / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
    (x,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
    assert dims == ["x_0", "x_1", 96]


def test_large_weights_go_to_a_file_of_their_own(
    small: fxcompress.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fxcompress.backends.onnx.export as export

    make = export.Options.__init__
    low = tuple(1000 if value == EXTERNAL_THRESHOLD else value for value in make.__defaults__ or ())
    monkeypatch.setattr(make, "__defaults__", low)
    report = small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS)
    assert {file.name for file in report.files} == {"m.onnx", "m.onnx.data"}
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    (found,) = run(tmp_path / "m.onnx", x=ROWS)
    assert found.shape == ROWS.shape
    small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS, external_data=False, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"], "a stale data file would be misleading"
    assert EXTERNAL_THRESHOLD < 2**31


def test_a_wrong_translation_is_an_error_that_names_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fxcompress.backends.onnx.products as products

    right = products.Products.blocks

    def wrong(self: Any, name: str, codes: Any, packed: Any, block: int, dtype: Any) -> Any:
        b, scales, zeros, bits = right(self, name, codes, packed, block, dtype)
        if name == "down.weight":
            self.constants.bind(scales, "wrong", self.constants.value(scales) * 10)
        return b, scales, zeros, bits

    small = compressed(Perceptron().eval(), weights(bits=8, group_size=32), ROWS)
    monkeypatch.setattr(products.Products, "blocks", wrong)
    with pytest.raises(BackendError, match="differ on example inputs"):
        small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS)
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_bisection_names_the_first_node_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxcompress.backends.onnx.translation as translation

    def wrong(x: Any, scale: Any, zero: Any, axis: int) -> Any:
        return translation.onnx.QuantizeLinear(translation.onnx.Neg(x), scale, zero, axis=axis)

    wrong.__annotations__ = translation._quantize_linear.__annotations__
    table = {**translation.translation_table()}
    for key, value in table.items():
        if value is translation._quantize_linear:
            table[key] = wrong
    import fxcompress.backends.onnx.translate as translate

    monkeypatch.setattr(translate, "translation_table", lambda: table)
    small = compressed(Perceptron().eval(), STATIC, ROWS)
    with pytest.raises(BackendError, match=r"First diverging node: dequantize_linear\w* \(Dequant"):
        small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS)


def test_accuracy_level_falls_back_where_int8_blocks_are_too_coarse(
    small: fxcompress.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small.export_onnx(tmp_path / "a.onnx", example_inputs=ROWS).accuracy_level == 4
    monkeypatch.setattr(parity, "ROUNDED", (1e-4, 1e-4))
    report = small.export_onnx(tmp_path / "b.onnx", example_inputs=ROWS)
    assert report.accuracy_level == 1
    assert max(p.relative for p in report.parity) < 1e-5
    report = small.export_onnx(tmp_path / "c.onnx", example_inputs=ROWS, accuracy_level=4)
    assert report.accuracy_level == 4  # asked for: held to wider limits
    monkeypatch.setattr(parity, "ASKED", (1e-4, 1e-4))
    with pytest.raises(BackendError, match="differ on"):
        small.export_onnx(tmp_path / "d.onnx", example_inputs=ROWS, accuracy_level=4)
    report = small.export_onnx(tmp_path / "d.onnx", example_inputs=ROWS, accuracy_level=1)
    assert max(p.relative for p in report.parity) < 1e-5


def test_slow_kernels_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = compressed(Perceptron().eval(), weights(bits=8, group_size=32), ROWS)
    small.export_onnx(tmp_path / "a.onnx", example_inputs=ROWS)
    assert "accuracy_level=4" not in caplog.text
    monkeypatch.setattr(parity, "ROUNDED", (1e-4, 1e-4))
    small.export_onnx(tmp_path / "b.onnx", example_inputs=ROWS)
    assert "with accuracy_level=4 single tokens are many times faster" in caplog.text


def test_divergence_is_judged_by_its_mean_over_positions() -> None:
    def found(kl: float | None, positions: int, relative: float = 0.0) -> parity.Parity:
        return parity.Parity("x", 0.0, relative, kl, None, positions)

    limits = (0.05, 0.005)
    long, few = found(0.004, 100), found(0.018, 2)
    assert parity.outside([long, few], [limits] * 2) is None  # 0.0043 on average
    assert parity.outside([long, found(0.021, 2)], [limits] * 2) == 1  # alone too far
    assert parity.outside([found(0.0051, 100), few], [limits] * 2) == 1
    assert parity.outside([found(0.0051, 100), found(0.001, 2)], [limits] * 2) == 0
    assert parity.outside([found(None, 1, 0.04), found(None, 1, 0.06)], [limits] * 2) == 1
    assert parity.outside([found(None, 1, 0.04)], [limits]) is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"opset": 17}, BackendError, "opset 17 cannot be written"),
        ({"target": "tensorrt"}, BackendError, "target 'tensorrt'"),
        ({"external_data": "maybe"}, BackendError, "external_data='maybe'"),
        ({"cache": True}, BackendError, "input_ids"),
        ({"accuracy_level": 2}, BackendError, "accuracy_level=2, expected 4, 1 or None"),
        ({"accuracy_level": 1, "target": "portable"}, BackendError, "in portable files"),
    ],
)
def test_bad_options(
    small: fxcompress.CompressedModel, options: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS, **options)
    assert not list(tmp_path.iterdir())


def test_bad_paths(small: fxcompress.CompressedModel, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "missing" / "m.onnx", "no such directory"),
        (tmp_path / "m.pb", "must end in .onnx"),
    ):
        with pytest.raises(ArtifactError, match=message):
            small.export_onnx(path, example_inputs=ROWS)
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS)
    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_a_missing_extra_says_what_to_install(
    small: fxcompress.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models", "decoders", "export", "translate"):
        monkeypatch.delitem(sys.modules, f"fxcompress.backends.onnx.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(BackendError, match=r"onnx_ir, which is not installed.*fxcompress\[onnx\]"):
        small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS)


class Wordy(nn.Module):
    """Compresses with one example, and cannot be exported with another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] > 5 and x.sum() > 0:  # the line a user has to look at
            return self.linear(x)
        return self.linear(x) + 1


def test_a_model_that_cannot_be_captured_names_the_line(tmp_path: Path) -> None:
    small = compressed(Wordy().eval(), "w8a16", ROWS[:, :3])
    with pytest.raises(fxcompress.FxCompressError, match="the line a user has to look at"):
        small.export_onnx(tmp_path / "m.onnx", example_inputs=torch.randn(2, 9, 96))


def test_half_precision_weights_export_and_bfloat16_is_refused(tmp_path: Path) -> None:
    small = compressed(Perceptron().eval().bfloat16(), "w8a16", ROWS.bfloat16())
    with pytest.raises(BackendError, match=r"bfloat16.*float32"):
        small.export_onnx(tmp_path / "m.onnx", example_inputs=ROWS.bfloat16())


def test_integer_products_take_codes_counted_from_zero(tmp_path: Path) -> None:
    compressed(Perceptron().eval(), "w8a8", ROWS).export_onnx(tmp_path / "m.onnx", example_inputs=ROWS)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert products
    assert {types[node.input[0]] for node in products} == {onnx.TensorProto.UINT8}
