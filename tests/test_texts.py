"""The evaluation texts are long enough, clean, and share nothing with the calibration text."""

from __future__ import annotations

import pytest

from tests.texts import documentation_text, documentation_topics, news_text


def test_documentation_splits_share_no_paragraph() -> None:
    calibration = {" ".join(part.split()) for part in documentation_text("calibration").split("\n\n")}
    held_out = {" ".join(part.split()) for part in documentation_text("held-out").split("\n\n")}
    assert not calibration & held_out
    assert not {*documentation_topics("calibration")} & {*documentation_topics("held-out")}
    with pytest.raises(ValueError, match="'calibration' or 'held-out'"):
        documentation_text("train")  # type: ignore[arg-type]


def test_news_is_long_enough() -> None:
    assert len(news_text().split()) >= 6500


def test_news_repeats_no_paragraph_and_is_plain_text() -> None:
    paragraphs = news_text().strip().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert news_text().isascii()
