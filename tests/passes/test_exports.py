from __future__ import annotations

from fxcompress import passes
from fxcompress.registry import BUILTIN_PASSES, pass_class


def test_exports_are_the_built_in_passes() -> None:
    assert passes.__all__ == sorted(passes.__all__)
    assert {pass_class(name).__name__ for name in BUILTIN_PASSES} == set(passes.__all__)


def test_every_pass_says_what_it_is() -> None:
    for name in BUILTIN_PASSES:
        cls = pass_class(name)
        assert cls.name == name
        assert cls.summary.endswith(".")
        assert cls.source
        assert cls.__module__ == f"fxcompress.passes.{name.replace('-', '_')}"
