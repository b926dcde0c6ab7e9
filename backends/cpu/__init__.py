"""CPU lowering: quantize/dequantize patterns to generated kernels, or the fastest torch already has."""
