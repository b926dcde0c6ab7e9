"""The normal form: data types that say how a compressed site computes."""

from fxcompress.forms.activation import (
    ActivationQuantizer,
    DynamicPerToken,
    FloatPerTensor,
    FloatPerToken,
    StaticPerTensor,
)
from fxcompress.forms.component import Component, component, from_spec
from fxcompress.forms.emit import Eager, Emit
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.site_form import Scale, SiteForm, Transform
from fxcompress.forms.terms import FloatWeight, QuantizedWeight, WeightTerm

__all__ = [
    "ActivationQuantizer",
    "Component",
    "DynamicPerToken",
    "Eager",
    "Emit",
    "FloatPerTensor",
    "FloatPerToken",
    "FloatWeight",
    "QuantizedWeight",
    "Scale",
    "SiteForm",
    "StaticPerTensor",
    "Transform",
    "WeightLayout",
    "WeightTerm",
    "component",
    "from_spec",
]
