"""The normal form: data types that say how a compressed site computes."""

from fxcompress.forms.activation import (
    ActivationQuantizer,
    DynamicPerGroup,
    DynamicPerToken,
    FloatPerTensor,
    FloatPerToken,
    StaticPerCluster,
    StaticPerTensor,
)
from fxcompress.forms.component import Component, component, from_spec
from fxcompress.forms.emit import Eager, Emit, Within
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.low_rank import DenseWeight, LowRank
from fxcompress.forms.outliers import FixedOutliers, OutlierColumns, OutlierSplit, SplitQuantizer
from fxcompress.forms.site_form import EdgeQuantizer, Permute, Scale, Shift, SiteForm, Transform
from fxcompress.forms.terms import FloatWeight, QuantizedWeight, WeightTerm

__all__ = [
    "ActivationQuantizer",
    "Component",
    "DenseWeight",
    "DynamicPerGroup",
    "DynamicPerToken",
    "Eager",
    "EdgeQuantizer",
    "Emit",
    "FixedOutliers",
    "FloatPerTensor",
    "FloatPerToken",
    "FloatWeight",
    "LowRank",
    "OutlierColumns",
    "OutlierSplit",
    "Permute",
    "QuantizedWeight",
    "Scale",
    "Shift",
    "SiteForm",
    "SplitQuantizer",
    "StaticPerCluster",
    "StaticPerTensor",
    "Transform",
    "WeightLayout",
    "WeightTerm",
    "Within",
    "component",
    "from_spec",
]
