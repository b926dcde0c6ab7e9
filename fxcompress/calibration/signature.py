"""What a captured call takes: names, kinds and sizes of its inputs, and how one batch is laid out for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.capture.program import Program
from fxcompress.errors import CalibrationError
from fxcompress.registry import close_matches

__all__ = ["CallSignature", "Vocabulary", "fixed_sizes"]

aten = torch.ops.aten

# Ops that hand token ids on unchanged, on their way from an input to the embedding that reads them.
_SAME_IDS = {
    *(aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.to.dtype),
    *(aten.expand.default, aten.flatten.using_ints, aten.to.device, aten._to_copy.default),
}


@dataclass(frozen=True)
class Vocabulary:
    """An embedding that an input indexes directly."""

    name: str  # the embedding's parameter
    rows: int


class CallSignature:
    """The inputs of a captured program.

    Args:
        program: The program.

    Attributes:
        positional: Names of the positional arguments, ``None`` for one that is a nested structure.
        keywords: Names of the keyword arguments in captured order.
        nodes: Input placeholders by name.
        vocabularies: Input name to the embedding it indexes.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        by_name = {node.name: node for node in program.placeholders()}
        self.nodes: dict[str, fx.Node] = {name: by_name[name] for name in program.inputs}
        self.positional: list[str | None] = []
        self.keywords: list[str] = []
        self._node_of: dict[str, str] = {}  # argument name -> placeholder name
        self._read_spec()
        self.vocabularies = {
            name: found
            for name, node in self.nodes.items()
            if (found := _vocabulary(program, node)) is not None
        }

    def _read_spec(self) -> None:
        spec, names = self.program.in_spec, list(self.program.inputs)
        if spec is None:
            self.positional = list(names)
            self._node_of = {name: name for name in names}
            return
        position = 0
        for child in _children(spec.child(0)):
            name = names[position] if child.is_leaf() else None
            self.positional.append(name)
            if name is not None:
                self._node_of[name] = name
            position += child.num_leaves
        keywords = spec.child(1)
        for key, child in zip(list(keywords.context or []), _children(keywords), strict=True):
            self.keywords.append(key)
            if child.is_leaf():
                self._node_of[key] = names[position]
            position += child.num_leaves

    @property
    def names(self) -> list[str]:
        """Argument names a mapping may use, in call order."""
        return [*(name for name in self.positional if name is not None), *self.keywords]

    def placeholder(self, name: str) -> str | None:
        """The placeholder of an argument; None when the argument is a structure."""
        return self._node_of.get(name)

    def example(self, name: str) -> Any:
        """The captured value of an argument: a fake tensor or the constant itself; None for a structure."""
        node = self._node_of.get(name)
        return self.nodes[node].meta.get("val") if node is not None else None

    def is_constant(self, name: str) -> bool:
        """Whether the capture fixed the argument to a plain value (a flag, None); batches may omit it."""
        return name in self._node_of and not isinstance(self.example(name), Tensor)

    @property
    def tensor_names(self) -> list[str]:
        """Arguments that are tensors, or structures of tensors."""
        return [name for name in self.names if not self.is_constant(name)]

    def flatten(self, item: Any, where: str) -> list[Any]:
        """Lay one batch out in the order of ``program.inputs``.

        Args:
            item: A tensor (the call's only tensor), a mapping by argument name, a tuple/list of positional
                arguments, or a pair ``(args, kwargs)`` of a tuple and a mapping.
            where: What to call the batch in messages.

        Raises:
            CalibrationError: arguments are missing or too many, or of another structure.
        """
        if isinstance(item, Tensor):
            tensors = self.tensor_names
            if len(tensors) != 1:
                raise CalibrationError(
                    f"{where}: found one tensor, the captured call takes {tensors}.",
                    fix="give a dict by name.",
                )
            return self._by_name({tensors[0]: item}, where)
        if isinstance(item, Mapping):
            return self._by_name(item, where)
        if (
            isinstance(item, tuple)
            and len(item) == 2
            and isinstance(item[0], tuple)
            and isinstance(item[1], Mapping)
        ):
            return self._call(item[0], item[1], where)
        if isinstance(item, Sequence) and not isinstance(item, str):
            names = [*self.positional, *self.keywords]
            if len(item) > len(names):
                raise CalibrationError(
                    f"{where}: found {len(item)} values, the captured call takes {len(names)}: {self.names}.",
                    fix="if the loader also yields labels, give a callable or a generator that drops them.",
                )
            count = min(len(item), len(self.positional))
            return self._call(
                tuple(item[:count]), dict(zip(self.keywords, item[count:], strict=False)), where
            )
        raise CalibrationError(
            f"{where}: found a {type(item).__name__}.",
            fix="give a tensor, a dict by argument name or a tuple.",
        )

    def _by_name(self, item: Mapping[str, Any], where: str) -> list[Any]:
        given = dict(item)
        unknown = [key for key in given if key not in self.names]
        if unknown:
            raise CalibrationError(
                f"{where}: {unknown[0]!r} is no input of the captured call.",
                fix=close_matches(str(unknown[0]), self.names),
            )
        args: list[Any] = []
        for name in self.positional:
            if name is None:
                raise CalibrationError(
                    f"{where}: a positional argument of the captured call is a structure without a name.",
                    fix="give (args, kwargs) as in example_inputs.",
                )
            args.append(self._fill(name, given, where))
        return self._call(tuple(args), {k: v for k, v in given.items() if k in self.keywords}, where)

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str) -> list[Any]:
        given = dict(kwargs)
        rest = self.positional[len(args) :]
        full = [*args, *(self._fill(name, given, where) for name in rest)]
        filled = {key: self._fill(key, given, where) for key in self.keywords}
        extra = [key for key in given if key not in self.keywords and key not in rest]
        if extra:
            raise CalibrationError(
                f"{where}: {extra[0]!r} is no input of the captured call.",
                fix=close_matches(extra[0], self.names),
            )
        try:
            return self.program.flatten_inputs(tuple(full), filled)
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from error

    def _fill(self, name: str | None, given: Mapping[str, Any], where: str) -> Any:
        if name is not None and name in given:
            return given[name]
        if name is not None and self.is_constant(name):
            return self.example(name)
        raise CalibrationError(
            f"{where}: the input {name or 'at that position'!r} is missing;"
            f" the captured call takes {self.names}.",
            fix="give every tensor that example_inputs had.",
        )

    def check(self, flat: Sequence[Any], where: str) -> None:
        """Compare one laid-out batch with the capture: kind, rank, fixed sizes, finite values, vocabulary.

        Raises:
            CalibrationError: naming the input and what was found and expected.
        """
        for (name, node), value in zip(self.nodes.items(), flat, strict=True):
            example = node.meta.get("val")
            if isinstance(example, Tensor):
                if not isinstance(value, Tensor):
                    raise CalibrationError(f"{where}, {name}: found {value!r}, expected a tensor.")
                _check_tensor(value, example, f"{where}, {name}")
                if name in self.vocabularies:
                    _check_vocabulary(value, self.vocabularies[name], f"{where}, {name}")
            elif value != example and isinstance(example, bool | int | float | str | NoneType):
                raise CalibrationError(
                    f"{where}, {name}: found {value!r}, but the model was captured with {example!r}.",
                    fix="capture it again with the value you want.",
                )


def fixed_sizes(example: Tensor) -> list[int | None]:
    """Captured sizes of a tensor, None where the capture left them dynamic."""
    sizes: Sequence[Any] = example.shape
    # A dimension that began dynamic and was specialised stays a symbol, one that is known to be a number.
    return [size if isinstance(size, int) else size.node.maybe_as_int() for size in sizes]


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return [spec.child(index) for index in range(spec.num_children)]


def _check_tensor(value: Tensor, example: Tensor, where: str) -> None:
    same_kind = (
        value.dtype == example.dtype
        if example.is_floating_point() or example.is_complex() or example.dtype == torch.bool
        else not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    )
    if not same_kind:
        raise CalibrationError(
            f"{where}: found {value.dtype}, expected {example.dtype}.",
            fix=f"convert it with .to({example.dtype}).",
        )
    expected = fixed_sizes(example)
    fits = value.dim() == len(expected) and all(
        size is None or size == found for size, found in zip(expected, value.shape, strict=True)
    )
    if not fits:
        shown = ", ".join("any" if size is None else str(size) for size in expected)
        raise CalibrationError(f"{where}: found shape {tuple(value.shape)}, expected ({shown}).")
    if value.numel() == 0:
        raise CalibrationError(f"{where}: the tensor is empty, shape {tuple(value.shape)}.")
    if value.is_floating_point() and bool((value.isnan() | (value == float("inf"))).any()):
        raise CalibrationError(f"{where}: contains NaN or inf.", fix="remove or repair those samples.")


def _check_vocabulary(value: Tensor, vocabulary: Vocabulary, where: str) -> None:
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= vocabulary.rows:
        bad = low if low < 0 else high
        raise CalibrationError(
            f"{where}: token id {bad} is outside of {vocabulary.name}, which has {vocabulary.rows} rows.",
            fix="use the tokenizer that belongs to this model.",
        )


def _vocabulary(program: Program, node: fx.Node) -> Vocabulary | None:
    """The embedding that reads the ids of an input, found by following ops that do not change them."""
    example = node.meta.get("val")
    if not isinstance(example, Tensor) or example.is_floating_point():
        return None
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            if user.target is aten.embedding.default and user.args[1] is current:
                table = _weight_behind(program, user.args[0])
                if table is not None:
                    return Vocabulary(table, int(program.weights[table].shape[0]))
            elif user.target in _SAME_IDS and user.args[0] is current and user not in seen:
                seen.add(user)
                stack.append(user)
    return None


def _weight_behind(program: Program, value: Any) -> str | None:
    while isinstance(value, fx.Node) and value.op == "call_function" and value.target in _SAME_IDS:
        value = value.args[0]
    return program.weight_of.get(value.name) if isinstance(value, fx.Node) else None
