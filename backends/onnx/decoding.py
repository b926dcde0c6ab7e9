"""Quantized weights outside of products: look-ups, and dense values for every other use."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.backends.onnx.operators import ops
from fxcompress.backends.onnx.rewriting import Rewriting, check_dtype
from fxcompress.backends.onnx.weights import Packed, block_size, codes_of, signed_matrix
from fxcompress.forms import WeightLayout

__all__ = ["Decoding"]

aten = torch.ops.aten
fxc = torch.ops.fxcompress


class Decoding(Rewriting):
    """Lowers look-ups in quantized tables and the decoding of whole weights."""

    def run(self) -> None:
        """Lower all of them."""
        self.each(
            {
                fxc.quantized_embedding.default: self._embedding,
                fxc.dequantize_weight.default: self._dequantize,
                fxc.dequantize_float_weight.default: self._dequantize_float,
            }
        )

    def _embedding(self, node: fx.Node) -> None:
        arguments: tuple[Any, ...] = node.args
        ids, codes, scale, zero, bits, group_size, columns, dtype = arguments
        assert isinstance(codes, fx.Node)
        value = self.constants.value
        layout = WeightLayout.rows((value(codes).shape[1], columns))
        packed = Packed(value(codes), value(scale), value(zero), bits, group_size, layout)
        check_dtype(self.names.get(node, node.name), dtype)
        block = None if self.portable else block_size(packed)
        if block is not None and (bits <= 4 or self.constants.has((codes, "blocks"))):
            name = self.note(node, "GatherBlockQuantized")
            b, scales, zeros, width = self.blocks(name, codes, packed, block, dtype)
            with self.graph.inserting_before(node):
                new = self.graph.call_function(
                    ops.gather_nbits.default, (ids, b, scales, zeros, width, block, columns)
                )
            self.replace(node, new)
            return
        matrix = signed_matrix(packed)
        if matrix is None or bits <= 4:
            self.note(node, "Gather of packed rows, decoded by plain operators")
            return  # the operator's own definition: rows are unpacked after the look-up
        name = self.note(node, "Gather of int8 rows")
        self.replace(node, self._gather_rows(node, name, ids, codes, matrix, dtype))

    def _gather_rows(
        self, node: fx.Node, name: str, ids: Any, codes: fx.Node, matrix: Any, dtype: Any
    ) -> fx.Node:
        """Rows of int8 codes and their scales are looked up; only they are dequantized."""
        rows, scales, zeros = matrix
        table = self.constants.add((codes, "signed"), f"{name}.codes", lambda: rows)
        scale = self.constants.add((codes, "row scales", dtype), f"{name}.scale", lambda: scales.to(dtype))
        call = self.graph.call_function
        with self.graph.inserting_before(node):
            value = call(aten.to.dtype, (call(aten.index.Tensor, (table, [ids])), dtype))
            if zeros is not None:
                points = self.constants.add((codes, "row zeros"), f"{name}.zero", lambda: zeros)
                point = call(aten.to.dtype, (call(aten.index.Tensor, (points, [ids])), dtype))
                value = call(aten.sub.Tensor, (value, call(aten.unsqueeze.default, (point, -1))))
            factor = call(aten.unsqueeze.default, (call(aten.index.Tensor, (scale, [ids])), -1))
            return call(aten.mul.Tensor, (value, factor))

    def _dequantize(self, node: fx.Node) -> None:
        packed = self.packed_of(node)
        assert packed is not None
        arguments: tuple[Any, ...] = node.args
        name, dtype, codes = self.note(node, "DequantizeLinear"), arguments[-1], arguments[0]
        found = codes_of(packed)
        four = {"four_bits": found.four_bits}
        q = self.constants.add((codes, "linear"), f"{name}.codes", lambda: found.codes, **four)
        s = self.constants.add(
            (codes, "linear scales", dtype), f"{name}.scale", lambda: found.scale.to(dtype)
        )
        zero = found.zero
        z = (
            zero
            if zero is None
            else self.constants.add((codes, "linear zeros"), f"{name}.zero", lambda: zero, **four)
        )
        with self.graph.inserting_before(node):
            new = self.graph.call_function(ops.dequantize_linear.default, (q, s, z, found.axis, found.block))
            if found.block:
                new = self.from_matrix(new, packed.layout)
        self.replace(node, new)

    def _dequantize_float(self, node: fx.Node) -> None:
        arguments: tuple[Any, ...] = node.args
        codes, scale, block_rows, block_columns, shape, perm, batch_dims, row_dims, dtype = arguments
        name = self.note(node, "DequantizeLinear of 8-bit floats")
        check_dtype(name, dtype)
        layout = WeightLayout(tuple(shape), tuple(perm), batch_dims, row_dims)
        batch, rows, columns = layout.matrix_shape
        values, factors = self.constants.value(codes), self.constants.value(scale)
        if block_rows != 1:
            factors = factors.repeat_interleave(block_rows or rows, 1)[:, :rows]
        per_row = not block_columns or block_columns >= columns
        if per_row and batch == 1 and layout.row_dims == 1:
            dense, axis, block = layout.from_matrix(values).contiguous(), layout.perm[layout.batch_dims], 0
            factors = factors.reshape(-1)
        else:
            dense, axis, block = values, 2, columns if per_row else block_columns
        q = self.constants.add((codes, "linear"), f"{name}.codes", lambda: dense)
        s = self.constants.add(
            (codes, "linear scales"), f"{name}.scale", lambda: factors.to(dtype).contiguous()
        )
        with self.graph.inserting_before(node):
            new = self.graph.call_function(ops.dequantize_linear.default, (q, s, None, axis, block))
            if block:
                new = self.from_matrix(new, layout)
        self.replace(node, new)
