"""Loading models of the Hugging Face ecosystem: local folders and GGUF files, through generic classes only.

Code that a folder brings along is never run, and nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxcompress.artifact.content import Artifact, Identity
from fxcompress.errors import ArtifactError, FxCompressError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HEADS = (
    "CausalLM",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MaskedLM",
    "ImageClassification",
    "SpeechSeq2Seq",
    "AudioClassification",
)
"""What follows ``AutoModelFor`` in the generic classes that are tried, most common first."""


def load_hf_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model and, if there is one, its tokenizer.

    Args:
        path: A folder with ``config.json``, a GGUF file, or a folder with one GGUF file.
        dtype: Dtype of the weights. Default: that of the files; float32 for GGUF, which is dequantized.
        device: Where the weights go. Default ``"cpu"``.

    Returns:
        The model in eval mode, and the tokenizer or None.

    Raises:
        FxCompressError: transformers is not installed, the path holds no such model, or the model needs code
            that is not part of transformers.

    Example:
        >>> model, tokenizer = load_hf_model("models/tiny")  # doctest: +SKIP
    """
    transformers = _transformers()
    folder, gguf = _locate(Path(path))
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf is not None:
        options["gguf_file"] = gguf
        dtype = dtype or torch.float32
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        auto = _auto_class(transformers, config)
        model = auto.from_pretrained(folder, config=config, dtype=dtype or "auto", **options)
        tokenizer = _tokenizer(transformers, folder, options)
    except Exception as error:  # readers of damaged files raise anything
        raise FxCompressError(
            f"{path}: transformers cannot load it ({_first_line(error)}).",
            fix="check the folder, or convert the model to a class that transformers has.",
        ) from error
    if gguf is not None:
        _forget_quantization(model)
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded, tokenizer


def _forget_quantization(model: Any) -> None:
    """Drop what describes the file, not these dequantized weights, and would prevent saving them."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if name in vars(owner):
            delattr(owner, name)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved in an artifact or model folder, or None when it has none.

    Raises:
        FxCompressError: transformers is not installed, or the files are damaged.
    """
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        return _tokenizer(_transformers(), Path(path), options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FxCompressError(f"{path}: its tokenizer cannot be loaded ({_first_line(error)}).") from error


def identity_of(module: nn.Module) -> Identity:
    """How an artifact names ``module``: by class and configuration when transformers can build it again.

    A subclass defined elsewhere, or a class known to transformers only by registration, is a plain module.
    """
    transformers = sys.modules.get("transformers")
    name = type(module).__name__
    if transformers is None or getattr(transformers, name, None) is not type(module):
        return Identity.of_module(module)
    if not issubclass(type(module), transformers.PreTrainedModel):
        return Identity.of_module(module)
    generation = getattr(module, "generation_config", None)
    config: Any = module.config
    return Identity(
        "transformers",
        name,
        json.loads(config.to_json_string(use_diff=False)),
        json.loads(generation.to_json_string()) if generation is not None else None,
    )


def empty_model(artifact: Artifact) -> PreTrainedModel:
    """Build the model class of an artifact without memory for its weights.

    Parameters are single NaNs expanded to the recorded shapes and dtypes, tied as the class ties them;
    buffers are computed. It has the structure that the stored configuration gives.

    Raises:
        ArtifactError: the class is unknown to the installed transformers, or it is no model of that library.
    """
    identity = artifact.identity
    if identity.kind != "transformers" or identity.config is None:
        raise ArtifactError(
            f"the artifact was made from {identity.class_name}, which cannot be built from a file.",
            fix="pass a module of that class to load().",
        )
    transformers = _transformers()
    cls = getattr(transformers, identity.class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ArtifactError(
            f"{identity.class_name}: no model class of transformers {transformers.__version__}.",
            fix="install the version it was made with.",
        )
    try:
        model: Any = build_model(cls, identity.config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"{identity.class_name}: cannot be built from the stored configuration ({_first_line(error)})."
        ) from error
    if identity.generation_config is not None and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_dict(identity.generation_config)
    fill_empty(model, artifact.layout)
    built: PreTrainedModel = model.eval()
    return built


def build_model(cls: Any, content: dict[str, Any], device: torch.device | None = None) -> Any:
    """A model of a class from the content of ``config.json``, its parameters on the meta device and tied.

    Args:
        cls: A model class of transformers.
        content: The configuration.
        device: Where buffers go. Default: real memory, with the values that the class computes.
    """
    with _parameters_on_meta() if device is None else device:
        model = cls(_config(cls, content))
    model.tie_weights()
    return model


def _config(cls: Any, content: dict[str, Any]) -> Any:
    """A configuration from JSON content; through a file, because only that way undoes how inf is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(content), encoding="utf-8")
        return cls.config_class.from_json_file(path)


def fill_empty(model: nn.Module, layout: Mapping[str, torch.dtype]) -> None:
    """Turn meta parameters into single NaNs, expanded, in the dtypes of ``layout`` (by any name)."""
    real: dict[int, nn.Parameter] = {}
    for prefix, owner in model.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in real:
                dtype = layout.get(f"{prefix}.{key}".lstrip("."), parameter.dtype)
                value = torch.full((), math.nan if dtype.is_floating_point else 0, dtype=dtype)
                real[id(parameter)] = nn.Parameter(value.expand(parameter.shape), requires_grad=False)
            owner._parameters[key] = real[id(parameter)]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as soon as a module registers it; buffers stay real.

    ``torch.device("meta")`` would lose the values of non-persistent buffers, which no file has.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise FxCompressError(
            "loading this needs transformers, which is not installed.", fix="pip install 'fxcompress[hf]'"
        ) from error
    return transformers


def _locate(path: Path) -> tuple[Path, str | None]:
    """The folder, and the name of the GGUF file if it is one."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise FxCompressError(
                f"{path}: neither a folder nor a GGUF file.", fix="pass the folder that holds config.json."
            )
        return path.parent, path.name
    if not path.is_dir():
        raise FxCompressError(
            f"{path}: no such file or folder.", fix="download the model first, pass its folder."
        )
    if (path / "config.json").is_file():
        return path, None
    found = sorted(file.name for file in path.glob("*.gguf"))
    if len(found) != 1:
        raise FxCompressError(
            f"{path}: no config.json and {len(found)} GGUF files.",
            fix="name the folder or file of one model.",
        )
    return path, found[0]


def _auto_class(transformers: Any, config: Any) -> Any:
    """The generic class whose model for ``config`` is the one the files were saved from."""
    wanted = set(getattr(config, "architectures", None) or ())
    usable = []
    for head in _HEADS:
        auto = getattr(transformers, f"AutoModelFor{head}", None)
        if auto is None or type(config) not in auto._model_mapping:
            continue
        usable.append(auto)
        found = auto._model_mapping[type(config)]
        if wanted & {cls.__name__ for cls in (found if isinstance(found, tuple | list) else (found,))}:
            return auto
    return usable[0] if usable and not wanted else transformers.AutoModel


def _tokenizer(transformers: Any, folder: Path, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
    if "gguf_file" not in options and not any((folder / name).is_file() for name in names):
        return None
    tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
