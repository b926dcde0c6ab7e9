"""Channel groups of every model of the zoo, of the packaged model and of deep ones: how many, why not more.

Run: python -m tests.benchmarks.groups [--only NAME ...]

Every group is cut together with all others, random units each, and compared with masking them in float64.
Seconds are of the analysis alone, the best of three runs, capture not counted. Rows are added to
``results/groups.json`` as they come; rows measured already are kept unless they are named.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.analysis.channel_groups import ChannelGroups, find_channel_groups
from fxcompress.capture import capture_model
from fxcompress.capture.program import Program
from fxcompress.structure.oracle import check_kept
from tests.benchmarks.common import RESULTS, environment, packaged_model, write
from tests.zoo import ZOO

RUNS = 3
DEPTHS = (25, 100)
Made = tuple[nn.Module, dict[str, Any]]


def deep_model(layers: int) -> nn.Module:
    """A decoder with the ops of the packaged model, narrow and deep."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 60, (2, 8)), "use_cache": False}


def models() -> Iterator[tuple[str, Callable[[], Made]]]:
    """Name and builder of everything that is measured."""
    yield "packaged", lambda: (packaged_model()[0], tokens())
    for depth in DEPTHS:
        yield f"{depth} layers", lambda depth=depth: (deep_model(depth), tokens())  # type: ignore[misc]
    for name, animal in ZOO.items():
        yield name, lambda animal=animal: (animal.build(), animal.inputs())  # type: ignore[misc]


def measure(made: Made) -> dict[str, Any]:
    model, inputs = made
    program = capture_model(model, (), inputs)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        groups = find_channel_groups(program)
        seconds.append(time.perf_counter() - start)
    return {
        "nodes": len(program.graph.nodes),
        "seconds": min(seconds),
        "steps": groups.typing.axes.operations,
        "groups": dict(Counter(group.kind for group in groups)),
        "units": dict(Counter(f"{group.kind} of {group.units}" for group in groups)),
        "frozen": len(groups.frozen),
        "reasons": reasons(groups),
        "largest difference": difference(program, groups, inputs),
    }


def reasons(groups: ChannelGroups) -> dict[str, int]:
    """Reason, node names left out → number of dimensions."""
    texts = [re.sub(r" \(\w+\)|'\w+'", "", group.frozen) for group in groups.frozen]
    return dict(Counter(texts).most_common())


def gone(group: ChannelGroup) -> int:
    """About a third of the units, as far as a router leaves them."""
    return min(group.units // 3, group.units - group.least)


def difference(program: Program, groups: ChannelGroups, inputs: dict[str, Any]) -> float:
    """All groups cut at once, about a third of the units of each, against masking."""
    generator = torch.Generator().manual_seed(0)
    kept = {
        group.name: torch.randperm(group.units, generator=generator)[gone(group) :].sort().values
        for group in groups
        if group.units > 1
    }
    return check_kept(program, groups, kept, program.flatten_inputs((), inputs)) if kept else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    path = RESULTS / "groups.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
    for name, build in models():
        if (options.only and name not in options.only) or (name in rows and name not in options.only):
            continue
        rows[name] = measure(build())
        write("groups", {"environment": environment(["-m", "tests.benchmarks.groups"]), "models": rows})
        sys.stderr.write(f"{name}: {rows[name]['groups']}\n")


if __name__ == "__main__":
    main()
