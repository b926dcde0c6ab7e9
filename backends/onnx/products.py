"""Products with quantized weights: blocks, exact integers, or integers between quantizers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcompress.backends.onnx import activations
from fxcompress.backends.onnx.operators import ops
from fxcompress.backends.onnx.rewriting import Lowered, Rewriting
from fxcompress.backends.onnx.weights import Packed, block_size, codes_of, signed_matrix
from fxcompress.forms import WeightLayout

__all__ = ["FLOAT_ACCURACY", "INT8_ACCURACY", "Products"]

aten = torch.ops.aten
fxc = torch.ops.fxcompress

INT8_ACCURACY, FLOAT_ACCURACY = 4, 1
"""``accuracy_level`` of ``MatMulNBits``: activations rounded to int8 per block, or kept in float."""


class Products(Rewriting):
    """Lowers products of an activation with a quantized weight."""

    def __init__(self, lowered: Lowered, names: dict[fx.Node, str], portable: bool) -> None:
        super().__init__(lowered, names, portable)
        self._counted: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def run(self) -> None:
        """Lower all of them."""
        self.each({fxc.outlier_product.default: self._outlier_product})
        self.each({aten.linear.default: self._linear})

    def _outlier_product(self, node: fx.Node) -> None:
        """The outlier part of an activation times the whole weight: most channels are zero."""
        rest, codes, scale, zero, bits, group_size, shape, perm = node.args
        dtype = rest.meta["val"].dtype  # type: ignore[union-attr]
        with self.graph.inserting_before(node):
            weight = self.graph.call_function(
                fxc.dequantize_weight.default,
                (codes, scale, zero, bits, group_size, shape, perm, 0, 1, dtype),
            )
            self.names[weight] = self._name_of_codes(codes)
            turned = self.graph.call_function(aten.t.default, (weight,)) if tuple(perm) == (1, 0) else weight  # type: ignore[arg-type]
            new = self.graph.call_function(aten.linear.default, (rest, turned))
        self.replace(node, new)

    def _name_of_codes(self, codes: Any) -> str:
        return next(
            (name for node, name in self.names.items() if node.args and codes in node.args), codes.name
        )

    def _linear(self, node: fx.Node) -> None:
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        turned = isinstance(weight, fx.Node) and weight.target is aten.t.default
        source = weight.args[0] if turned else weight  # type: ignore[union-attr]
        packed = self.packed_of(source)
        if (
            packed is None
            or packed.layout.perm != ((1, 0) if turned else (0, 1))
            or packed.layout.row_dims != 1
        ):
            return
        assert isinstance(x, fx.Node)
        assert isinstance(source, fx.Node)
        codes = source.args[0]
        assert isinstance(codes, fx.Node)
        matrix = signed_matrix(packed)
        dynamic, static = activations.dynamic_codes(x), activations.is_static(x)
        dtype = source.args[-1]
        if dynamic is not None and matrix is not None and packed.bits > 4:
            y = self._integer_product(node, source, codes, dynamic, matrix, dtype)
        elif static and matrix is not None and packed.bits > 4:
            y = self._static_product(node, source, codes, x, matrix, dtype)
            bias = activations.integer_bias(self.graph, self.constants, node, bias, x, matrix[1], dtype)
        else:
            y = self._block_product(node, source, codes, x, packed, bias, dtype)
            bias = None
        if bias is not None:
            with self.graph.inserting_before(node):
                y = self.graph.call_function(aten.add.Tensor, (y, bias))
        self.replace(node, y)

    def _integer_product(
        self, node: fx.Node, source: fx.Node, codes: fx.Node, dynamic: Any, matrix: Any, dtype: Any
    ) -> fx.Node:
        """``(q · (C − z)ᵀ) · s_x · s_w`` with an exact integer product."""
        name = self.note(source, "MatMulInteger" if self.portable else "MatMulIntegerToFloat")
        rows, scales, zeros = matrix
        # Kept [N, K]: a tied table's rows are looked up in the same tensor. The runtime turns it once.
        b = self.constants.add((codes, "signed"), f"{name}.codes", lambda: rows)
        scale = self.constants.add((codes, "row scales", torch.float32), f"{name}.scale", scales.float)
        zero = (
            zeros
            if zeros is None
            else self.constants.add((codes, "row zeros"), f"{name}.zero", lambda: zeros)
        )
        q, token_scale = self._token_codes(*dynamic)
        call = self.graph.call_function
        with self.graph.inserting_before(node):
            turned = call(aten.t.default, (b,))
            if self.portable:
                exact = call(ops.matmul_integer.default, (q, turned, zero))
                product = call(aten.mul.Tensor, (call(aten.to.dtype, (exact, torch.float32)), scale))
            else:
                product = call(ops.matmul_scaled.default, (q, turned, scale, zero))
            y = call(aten.mul.Tensor, (product, token_scale))
            return y if dtype == torch.float32 else call(aten.to.dtype, (y, dtype))

    def _token_codes(self, codes: fx.Node, scale: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Codes counted from 0, and scales, in place of signed ones; readers of one activation share them."""
        if codes in self._counted:
            return self._counted[codes]
        source = codes.args[0]
        assert isinstance(source, fx.Node)
        call = self.graph.call_function
        with self.graph.inserting_before(codes.next):
            if source.target is fxc.quantize_per_token.default:
                x, bits = source.args
                assert isinstance(x, fx.Node)
                wide = x if x.meta["val"].dtype == torch.float32 else call(aten.to.dtype, (x, torch.float32))
                both = call(ops.token_codes.default, (wide, bits))
                found = call(operator.getitem, (both, 0)), call(operator.getitem, (both, 1))
            else:
                found = call(ops.counted.default, (codes,)), scale
        self._counted[codes] = found
        return found

    def _static_product(
        self, node: fx.Node, source: fx.Node, codes: fx.Node, x: fx.Node, matrix: Any, dtype: Any
    ) -> fx.Node:
        """A product between dequantizers, which the runtime makes one integer kernel."""
        name = self.note(source, "QDQ MatMul")
        rows, scales, zeros = matrix
        b = self.constants.add((codes, "signed turned"), f"{name}.codes_kn", lambda: rows.t().contiguous())
        scale = self.constants.add((codes, "row scales", dtype), f"{name}.scale", lambda: scales.to(dtype))
        # Always given: the runtime recognises the pattern by it.
        points = torch.zeros(scales.shape, dtype=torch.int8) if zeros is None else zeros
        zero = self.constants.add((codes, "all row zeros"), f"{name}.zero", lambda: points)
        with self.graph.inserting_before(node):
            weight = self.graph.call_function(ops.dequantize_linear.default, (b, scale, zero, 1, 0))
            return self.graph.call_function(aten.matmul.default, (x, weight))

    def _block_product(
        self,
        node: fx.Node,
        source: fx.Node,
        codes: fx.Node,
        x: fx.Node,
        packed: Packed,
        bias: Any,
        dtype: Any,
    ) -> fx.Node:
        block = None if self.portable else block_size(packed)
        if block is None:
            return self._dense_product(node, source, codes, x, packed, bias, dtype)
        name = self.note(source, "MatMulNBits")
        b, scales, zeros, bits = self.blocks(name, codes, packed, block, dtype)
        _, rows, columns = packed.layout.matrix_shape
        with self.graph.inserting_before(node):
            return self.graph.call_function(
                ops.matmul_nbits.default,
                (x, b, scales, zeros, bias, columns, rows, bits, block, INT8_ACCURACY),
            )

    def _dense_product(
        self,
        node: fx.Node,
        source: fx.Node,
        codes: fx.Node,
        x: fx.Node,
        packed: Packed,
        bias: Any,
        dtype: Any,
    ) -> fx.Node:
        """``matmul(x, dequantize_linear(codes [K, N]))``, blocks along the first dimension."""
        name = self.note(source, "DequantizeLinear")
        found = codes_of(_as_rows(packed))
        matrix = found.codes if found.block == 0 else found.codes[0]
        scale = found.scale if found.block == 0 else found.scale[0].t()
        points = None if found.zero is None else (found.zero if found.block == 0 else found.zero[0].t())
        axis = 1 if found.block == 0 else 0
        call = self.graph.call_function
        b = self.constants.add(
            (codes, "turned"), f"{name}.codes_kn", lambda: matrix.t().contiguous(), four_bits=found.four_bits
        )
        s = self.constants.add(
            (codes, "turned scales", dtype), f"{name}.scale_kn", lambda: scale.to(dtype).contiguous()
        )
        z: fx.Node | None = None
        if points is not None:
            z = self.constants.add(
                (codes, "turned zeros"),
                f"{name}.zero_kn",
                lambda: points.contiguous(),
                four_bits=found.four_bits,
            )
        with self.graph.inserting_before(node):
            weight = call(ops.dequantize_linear.default, (b, s, z, axis, found.block))
            y = call(aten.matmul.default, (x, weight))
            return y if bias is None else call(aten.add.Tensor, (y, bias))


def _as_rows(packed: Packed) -> Packed:
    """The same matrix with the identity layout ``[N, K]``."""
    _, rows, columns = packed.layout.matrix_shape
    layout = WeightLayout.rows((rows, columns))
    return Packed(packed.codes, packed.scale, packed.zero, packed.bits, packed.group_size, layout)
