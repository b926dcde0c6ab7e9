"""CPU lowering: quantize/dequantize patterns to the fastest kernels torch already has."""
