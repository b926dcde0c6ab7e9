"""The texts that tests calibrate and evaluate on: the same ones the examples use."""

from __future__ import annotations

from examples.texts import Split, documentation_text, documentation_topics, news_text

__all__ = ["Split", "documentation_text", "documentation_topics", "news_text"]
