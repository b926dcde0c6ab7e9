"""ONNX: compressed graphs as files that ONNX Runtime executes, checked against the reference."""
