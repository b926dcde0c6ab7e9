"""Calibration: what the model is shown, how it walks through the graph, and what is measured on the way."""

from fxcompress.calibration.inputs import Batch, CalibrationData, as_calibration
from fxcompress.calibration.statistics import ActivationStatistics
from fxcompress.calibration.walk import BlockRunner, Plan, Walk

__all__ = [
    "ActivationStatistics",
    "Batch",
    "BlockRunner",
    "CalibrationData",
    "Plan",
    "Walk",
    "as_calibration",
]
