"""The zoo: small random models of every kind the project claims to handle, one registry for all tests.

    from tests.zoo import DECODERS, entry, select

    @pytest.mark.parametrize("animal", DECODERS, ids=lambda animal: animal.name)
    def test_it(animal: ZooEntry) -> None:
        model = animal.build()
        output = model(**animal.inputs(batch=2, seq=8))

All weights are random, deterministic and fp32, models are in eval mode, and nothing is downloaded.
"""

from __future__ import annotations

from tests.zoo_decoders import DECODERS
from tests.zoo_entry import ZooEntry, enliven, generate_tokens, scores, seeded
from tests.zoo_others import ENCODER_DECODERS, ENCODERS, OTHERS, PLAIN, VISION

__all__ = [
    "DECODERS",
    "ENCODERS",
    "ENCODER_DECODERS",
    "OTHERS",
    "PLAIN",
    "SMOKE",
    "VISION",
    "ZOO",
    "ZooEntry",
    "enliven",
    "entry",
    "generate_tokens",
    "scores",
    "seeded",
    "select",
]

ZOO: dict[str, ZooEntry] = {animal.name: animal for animal in DECODERS + OTHERS}
if len(ZOO) != len(DECODERS) + len(OTHERS):
    raise ValueError("two zoo entries share a name")


def entry(name: str) -> ZooEntry:
    """Return the entry of that name; a KeyError lists the known ones."""
    if name not in ZOO:
        raise KeyError(f"no zoo entry {name!r}; known: {', '.join(sorted(ZOO))}")
    return ZOO[name]


def select(*tags: str, without: tuple[str, ...] = ()) -> tuple[ZooEntry, ...]:
    """Return the entries that carry all of `tags` and none of `without`.

    Raises:
        ValueError: when a tag is on no entry at all, or when nothing is left.
    """
    known = frozenset().union(*(animal.tags for animal in ZOO.values()))
    unknown = {*tags, *without} - known
    if unknown:
        raise ValueError(f"no zoo entry carries {sorted(unknown)}; known tags: {sorted(known)}")
    chosen = tuple(
        animal for animal in ZOO.values() if animal.tags.issuperset(tags) and animal.tags.isdisjoint(without)
    )
    if not chosen:
        raise ValueError(f"no zoo entry carries all of {tags} and none of {without}")
    return chosen


# One of each structure, for tests that cannot afford all: about 20 seconds to build and export.
SMOKE: tuple[ZooEntry, ...] = tuple(
    entry(name)
    for name in (
        "llama-tied-odd",
        "gpt2-odd",
        "gpt-neox",
        "falcon",
        "gemma2",
        "bloom",
        "mixtral",
        "deepseek-v3",
        "mamba",
        "bert",
        "t5",
        "resnet",
    )
)
