"""Capture: three frontends (torch.export, Dynamo, fx), one Program dialect."""

from fxcompress.capture.dynamo import program_from_dynamo
from fxcompress.capture.export import capture_model
from fxcompress.capture.graph import capture_graph_module
from fxcompress.capture.program import Program

__all__ = ["Program", "capture_graph_module", "capture_model", "program_from_dynamo"]
