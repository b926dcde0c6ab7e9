"""Who may import whom, what an import may load, and what the sources may say.

Imports are read from the syntax tree, so that a rule holds for code no test runs too.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fxcompress": "fxcompress", "passes": "fxcompress.passes", "backends": "fxcompress.backends"}
"""Folder of the repository -> the package it is installed as."""
MAX_LINES = 400
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "fxcompress", "passes", "backends", "tests", "examples", "docs"),
    *("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in", "Makefile", "constraints.txt"),
    *(".ci", ".editorconfig", ".gitignore", ".pre-commit-config.yaml"),
}
IMPORT_NAMES = {"pyyaml": "yaml", "optimum-quanto": "optimum", "onnx-ir": "onnx_ir"}
"""Distributions whose module has another name."""

FAMILIES = (
    "Llama|GPT2|Gpt2|GPTJ|GPTNeoX?|Bert|Roberta|DistilBert|DeBerta|Mistral|Mixtral|Qwen|Falcon|T5|ViT|Gemma"
    "|Bloom|Whisper|Mamba|Mamba2|DeepSeek|Deepseek|Olmo|OLMo|Starcoder2|Cohere|MiniLM|SmolLM|ResNet|DeiT|CLIP"
)
PART = r"(?:[A-Z][a-z]|MLP|RMS|MoE)\w*"
MODEL_NAME = re.compile(rf"\b(?:(?:{FAMILIES})[0-9]*(?:{PART})?|(?!AutoModel)[A-Z]\w*ForCausalLM)\b")
MODEL_TYPE = re.compile(
    r"(?:llama|gpt2|gptj|gpt_neox?|bert|roberta|distilbert|mistral|mixtral|qwen|falcon|t5|vit|gemma|bloom|whisper"
    r"|mamba|deepseek_v|olmo|phi|opt|cohere|smollm)[0-9]*(?:_moe)?"
)


@dataclass(frozen=True)
class Source:
    """One module of the project."""

    path: Path
    module: str
    layer: str
    text: str

    @property
    def where(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Import:
    """One imported module; ``top`` means that it is loaded together with the module that names it."""

    source: Source
    line: int
    target: str
    top: bool

    def __str__(self) -> str:
        return f"{self.source.where}:{self.line} imports {self.target}"


@cache
def sources() -> tuple[Source, ...]:
    found = []
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            module = ".".join([package, *(p for p in parts if p != "__init__")])
            found.append(Source(path, module, folder, path.read_text(encoding="utf-8")))
    return tuple(found)


class ImportReader(ast.NodeVisitor):
    """Collects import statements, each with whether importing the module executes it."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.Import | ast.ImportFrom, bool]] = []
        self._top = True

    def _deferred(self, nodes: Iterable[ast.AST]) -> None:
        before, self._top = self._top, False
        for node in nodes:
            self.visit(node)
        self._top = before

    def visit_Import(self, node: ast.Import) -> None:
        self.found.append((node, self._top))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found.append((node, self._top))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._deferred(node.body)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._deferred(node.body)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            self.generic_visit(node)
            return
        self._deferred(node.body)
        for child in node.orelse:
            self.visit(child)


def statements(text: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    reader = ImportReader()
    reader.visit(ast.parse(text))
    return reader.found


def targets(node: ast.Import | ast.ImportFrom, source: Source, modules: set[str]) -> Iterator[str]:
    """Absolute names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = source.module.split(".")
        package = package if source.path.name == "__init__.py" else package[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in modules else base


@cache
def imports() -> tuple[Import, ...]:
    modules = {source.module for source in sources()}
    return tuple(
        Import(source, node.lineno, target, top)
        for source in sources()
        for node, top in statements(source.text)
        for target in targets(node, source, modules)
    )


def within(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def from_layer(layer: str) -> Iterator[Import]:
    return (found for found in imports() if found.source.layer == layer)


@cache
def declared() -> tuple[frozenset[str], frozenset[str]]:
    """Importable names of the required distributions, and of those that extras add."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> frozenset[str]:
        found = (re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0].lower() for text in requirements)
        return frozenset(IMPORT_NAMES.get(name, name) for name in found) - {"fxcompress"}

    extras = project["optional-dependencies"]
    optional = names([text for name, group in extras.items() if name != "dev" for text in group])
    return names(project["dependencies"]), optional | {"triton"}  # triton comes with CUDA builds of torch


def code_of(source: Source) -> ast.Module:
    """The module without comments and without strings that stand alone, docstrings among them."""

    class Strip(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            return ast.Pass() if is_text else self.generic_visit(node)

    tree = Strip().visit(ast.parse(source.text))
    assert isinstance(tree, ast.Module)
    return ast.fix_missing_locations(tree)


def test_core_imports_neither_passes_nor_backends() -> None:
    wrong = [
        f for f in from_layer("fxcompress") for p in ("passes", "backends") if within(f.target, PACKAGES[p])
    ]
    assert not wrong, "the core finds passes and backends by name at run time: " + "; ".join(map(str, wrong))


def test_passes_import_no_backend_and_no_other_pass() -> None:
    backends = [f for f in from_layer("passes") if within(f.target, PACKAGES["backends"])]
    assert not backends, "; ".join(map(str, backends))
    shared = re.compile(r"fxcompress\.passes\._\w+")
    siblings = [
        f
        for f in from_layer("passes")
        if f.source.module != PACKAGES["passes"] and within(f.target, PACKAGES["passes"])
        if not shared.match(f.target)
    ]
    assert not siblings, "what two passes share belongs in a private module: " + "; ".join(map(str, siblings))


def test_backends_import_no_pass() -> None:
    wrong = [f for f in from_layer("backends") if within(f.target, PACKAGES["passes"])]
    assert not wrong, "; ".join(map(str, wrong))


def test_nothing_imports_tests_examples_or_the_bare_folders() -> None:
    outside = {"tests", "examples", "passes", "backends", "docs"}
    wrong = [f for f in imports() if f.target.split(".")[0] in outside]
    assert not wrong, "; ".join(map(str, wrong))


def test_imports_are_declared_and_extras_are_lazy() -> None:
    required, optional = declared()
    always = required | sys.stdlib_module_names | {"fxcompress"}
    undeclared = [f for f in imports() if f.target.split(".")[0] not in always | optional]
    assert not undeclared, "not in pyproject.toml: " + "; ".join(map(str, undeclared))
    eager = [
        f for f in imports() if f.top and f.source.layer != "backends" if f.target.split(".")[0] in optional
    ]
    assert not eager, "an extra must be imported inside the function that needs it: " + "; ".join(
        map(str, eager)
    )


def test_importing_the_package_is_lean(tmp_path: Path) -> None:
    _, optional = declared()
    code = (  # torch's own compiler loads triton where it is installed
        "import json, sys, torch, torch._dynamo; before = set(sys.modules); import fxcompress;"
        "assert not torch.cuda.is_initialized();"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not optional.intersection(json.loads(done.stdout))


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.where)
def test_source_is_short_and_names_no_architecture(source: Source) -> None:
    lines = source.text.count("\n")
    assert lines <= MAX_LINES, f"{lines} lines; split it by concept"
    code = code_of(source)
    named = {match.group() for match in MODEL_NAME.finditer(ast.unparse(code))}
    named |= {
        node.value
        for node in ast.walk(code)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MODEL_TYPE.fullmatch(node.value)
    }
    assert not named, f"a rule for one architecture is a rule missing for the next: {sorted(named)}"


def test_top_level_of_the_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name.split("/")[0] for name in listed.stdout.split("\0") if name}
    assert tracked == TOP_LEVEL


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import a.b", [("a.b", True)]),
        ("def f():\n    import a", [("a", False)]),
        ("try:\n    import a\nexcept ImportError:\n    import b", [("a", True), ("b", True)]),
        ("if x:\n    pass\nelse:\n    import a", [("a", True)]),
        (
            "class C:\n    import a\n    def f(self):\n        if x:\n            import b",
            [("a", True), ("b", False)],
        ),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", [("a", False), ("b", True)]),
        ("with x:\n    from a import b", [("a", True)]),
        ("match x:\n    case 1:\n        import a", [("a", True)]),
        ("from . import sibling\nfrom .. import errors", [("fxcompress.sub", True), ("fxcompress", True)]),
    ],
)
def test_reader_finds_every_import(text: str, expected: list[tuple[str, bool]]) -> None:
    source = Source(ROOT / "fxcompress/sub/module.py", "fxcompress.sub.module", "fxcompress", text)
    found = [(t, top) for node, top in statements(text) for t in targets(node, source, set())]
    assert found == expected


@pytest.mark.parametrize(
    "code", ["x = LlamaForCausalLM", "isinstance(m, BertLayer) or Qwen3MoeConfig", "'NewForCausalLM'"]
)
def test_model_names_are_recognised(code: str) -> None:
    assert MODEL_NAME.search(code)


@pytest.mark.parametrize(
    "code", ["AutoModelForCausalLM", "SplitK", "T_in", "CLIPPED", "Blocks", "Configuration"]
)
def test_ordinary_names_are_not_model_names(code: str) -> None:
    assert not MODEL_NAME.search(code)
