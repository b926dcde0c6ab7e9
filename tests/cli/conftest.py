"""A tiny language model and a tiny encoder on disk, with a tokenizer whose tokens are ASCII characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fxcompress.cli import app
from tests.zoo import ZOO

TEXT = "The quick brown fox jumps over the lazy dog; then it rests, and the dog does not mind. " * 12


def character_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(code): code for code in range(128)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="\0"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="\0", eos_token="\1")


def save(name: str, folder: Path) -> Path:
    model: Any = ZOO[name].build()
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama-tied-odd", tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("bert", tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Every command is its own process in real life; here they must not share what was compiled."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the program with arguments of any kind; output is wide enough for whole table rows."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call
