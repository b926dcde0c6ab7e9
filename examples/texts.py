"""English text for calibration and evaluation that needs no download.

Two kinds, so that a model tuned on the first can be judged on both:

- documentation: the language reference that ships with Python (`pydoc_data.topics`), cut by a hash of the
  topic's name into a calibration part and a held-out part that share no paragraph;
- news: `texts/news.txt` beside this file, feature articles written for this project, always held out.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

__all__ = ["Split", "documentation_text", "documentation_topics", "news_text"]

Split = Literal["calibration", "held-out"]

_NEWS = Path(__file__).with_name("texts") / "news.txt"
# One topic in four is held out: about a quarter of the text, enough for a stable perplexity.
_HELD_OUT_ONE_IN = 4
_RULE = re.compile(r"[*=\-~^]{3,}")


def documentation_topics(split: Split) -> tuple[str, ...]:
    """Return the sorted names of the topics in `split`, decided by the SHA-256 of each name.

    Raises:
        ValueError: when `split` is neither "calibration" nor "held-out".
    """
    if split not in ("calibration", "held-out"):
        raise ValueError(f"split: found {split!r}, expected 'calibration' or 'held-out'")
    return tuple(name for name in sorted(topics) if _is_held_out(name) == (split == "held-out"))


def documentation_text(split: Split) -> str:
    """Return the documentation text of one split, paragraphs separated by blank lines.

    Lines that only underline a heading are dropped; quotes, code and lists stay as they are. Some topics
    repeat parts of others: a paragraph is kept once, and in the held-out part where it occurs in both.
    The same Python release always gives the same text; another release may word its reference otherwise.

    Raises:
        ValueError: when `split` is neither "calibration" nor "held-out".

    Example:
        >>> text = documentation_text("calibration")
        >>> len(text) > 100_000
        True
    """
    seen = set() if split == "held-out" else {_key(text) for text in _paragraphs("held-out")}
    kept: list[str] = []
    for paragraph in _paragraphs(split):
        key = _key(paragraph)
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept) + "\n"


def news_text() -> str:
    """Return the held-out news articles, UTF-8, paragraphs separated by blank lines."""
    return _NEWS.read_text(encoding="utf-8")


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _paragraphs(split: Split) -> list[str]:
    found: list[str] = []
    for name in documentation_topics(split):
        lines = [line.rstrip() for line in topics[name].splitlines() if not _RULE.fullmatch(line.strip())]
        found.extend(block.strip("\n") for block in re.split(r"\n{2,}", "\n".join(lines)) if block.strip())
    return found


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())
