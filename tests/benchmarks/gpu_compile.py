"""Compile the kernels that tests/benchmarks/gpu.py measures, one share of them: ``--shard=2/10``.

Triton keeps compiled kernels on disk, so that several processes do for one what takes it minutes. They run
once, on small tensors whose sizes are divisible like those that are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fxcompress.backends.triton import configs, tuning
from fxcompress.backends.triton.launch import run_product
from tests.benchmarks import gpu, gpu_formats

OUTPUTS, INPUTS = 1024, 2048


def jobs(options: argparse.Namespace, device: Any) -> Iterator[tuple[str, int, configs.Config]]:
    """Distinct kernels: format, rows, configuration."""
    known, seen = tuning.current_device(device), set()
    forms = {
        name: make(torch.empty(1, 256, device=device), 16)[0] for name, make in gpu_formats.FORMATS.items()
    }
    for _, outputs, inputs, rows in gpu.sizes(options):
        for name, form in forms.items():
            if name not in options.formats:
                continue
            shape = configs.Shape(configs.row_bucket(rows), outputs, inputs)
            wanted = configs.ranked(form, shape, known)[: options.most if options.tune else 1]
            for config in wanted:
                constants = tuple(config.constants(form).items())
                key = (name, min(rows, 16), constants, config.warps, config.stages)
                if key not in seen:
                    seen.add(key)
                    yield name, rows, config


def main() -> None:
    """Compile every nth kernel."""
    parser = gpu.parser()
    parser.add_argument("--shard", required=True, help="which share of how many, as 0/10")
    options = parser.parse_args()
    shard, count = map(int, options.shard.split("/"))
    device = torch.device("cuda")
    failed: dict[str, str] = {}
    mine = list(jobs(options, device))[shard::count]
    for name, rows, config in mine:
        x = torch.randn(rows, INPUTS, device=device, dtype=torch.bfloat16)
        form, given, tensors = gpu_formats.FORMATS[name](x, OUTPUTS)
        try:
            run_product(form, config, given, tensors, OUTPUTS)
        except Exception as error:
            failed[f"{name} {rows} {config}"] = str(error).splitlines()[0][:200]
    sys.stdout.write(json.dumps({"compiled": len(mine), "failed": failed}) + "\n")


if __name__ == "__main__":
    main()
