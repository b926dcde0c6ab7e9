"""The report of a run: an account of every parameter, what the checks found, and what it cost."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from fxcompress.errors import ArtifactError
from fxcompress.forms import SiteForm

__all__ = ["Report", "WeightRow", "describe_form"]


@dataclass(frozen=True)
class WeightRow:
    """The account of one parameter.

    Args:
        name: Canonical qualified name.
        shape: As stored in the model.
        dtype: E.g. ``"float32"``.
        bytes_before: Stored bytes in the model.
        bytes_after: Stored bytes after the run.
        form: How it is stored and used now, e.g. ``"int4 asym g64"`` or ``"kept"``.
        passes: Passes that changed it, in order.
        error: Largest relative output error a pass caused at it, or None when not measured.
        reason: Why it was left as it is; empty for a compressed one.
        cut: Its shape after the structure was changed; empty when it was not. A removed one has no elements
            left.
        zeros: Exact zeros of a pruned parameter, counted in its final value; None when it was not pruned.
        products_before: Multiplications per row of inputs as the dense matrix it was; 0 for what multiplies
            nothing.
        products_after: Multiplications per row of inputs after the run.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes_before: int
    bytes_after: int
    form: str
    passes: tuple[str, ...] = ()
    error: float | None = None
    reason: str = ""
    cut: tuple[int, ...] = ()
    zeros: int | None = None
    products_before: int = 0
    products_after: int = 0


@dataclass
class Report:
    """What a run did.

    Args:
        recipe: The recipe as plain data.
        rows: One per parameter, in the order of the model.
        passes: Per pass: its name, number of edits by kind, and refusals.
        checks: Proofs and checks that ran, one mapping each.
        kl: Mean KL divergence per token in nats, or None.
        relative_error: End-to-end relative output error, or None.
        calibration: Source, batches and tokens of the data, empty without.
        structure: Parameters and operations before and after cuts, and what was cut; empty without.
        seconds: Wall time per stage; not part of :meth:`to_dict` unless asked for.

    Example:
        >>> report.show()
        >>> report.to_dict()["totals"]["ratio"]
        3.7
    """

    recipe: dict[str, Any]
    rows: tuple[WeightRow, ...]
    passes: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    kl: float | None = None
    relative_error: float | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters in the model."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters after the run."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def totals(self) -> dict[str, Any]:
        """Counts and bytes over all parameters."""
        after = self.bytes_after
        return {
            "parameters": len(self.rows),
            "compressed": sum(1 for row in self.rows if row.form not in ("kept", "edited")),
            "edited": sum(1 for row in self.rows if row.form == "edited"),
            "kept": sum(1 for row in self.rows if row.form == "kept"),
            "products_before": sum(row.products_before for row in self.rows),
            "products_after": sum(row.products_after for row in self.rows),
            "bytes_before": self.bytes_before,
            "bytes_after": after,
            "ratio": round(self.bytes_before / after, 4) if after else 1.0,
        }

    def to_dict(self, *, timings: bool = False) -> dict[str, Any]:
        """JSON-safe data, equal for equal runs; ``timings=True`` adds the wall times."""
        data: dict[str, Any] = {
            "recipe": self.recipe,
            "totals": self.totals,
            "relative_error": self.relative_error,
            "kl": self.kl,
            "calibration": self.calibration,
            "structure": self.structure,
            "passes": self.passes,
            "checks": self.checks,
            "weights": [
                dataclasses.asdict(row)
                | {"shape": list(row.shape), "passes": list(row.passes), "cut": list(row.cut)}
                for row in self.rows
            ],
        }
        return data | {"seconds": self.seconds} if timings else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read back what :meth:`to_dict` gave.

        Raises:
            ArtifactError: keys are missing or of the wrong kind.
        """
        try:
            rows = tuple(
                WeightRow(**{**row, **{key: tuple(row.get(key, ())) for key in ("shape", "passes", "cut")}})
                for row in data["weights"]
            )
            return cls(
                recipe=dict(data["recipe"]),
                rows=rows,
                passes=list(data["passes"]),
                checks=list(data["checks"]),
                kl=data["kl"],
                relative_error=data["relative_error"],
                calibration=dict(data["calibration"]),
                structure=dict(data.get("structure", {})),
                seconds=dict(data.get("seconds", {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"report: not in the expected shape: {error!r}.") from error

    def show(self, console: Console | None = None) -> None:
        """Print the report as a table; repeated blocks share a line.

        Args:
            console: Where to print. Default: standard output.
        """
        console = console or Console()
        table = Table(title=f"fxcompress: {self.recipe.get('name') or 'recipe'}", title_justify="left")
        for heading in (
            "weight",
            "n",
            "shape",
            "form",
            "MB before",
            "MB after",
            "max error",
            "passes / reason",
        ):
            right = heading in ("n", "MB before", "MB after", "max error")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        vectors = [row for row in self.rows if row.reason == "vector" and row.form == "kept"]
        for pattern, rows in self.groups():
            if rows[0] not in vectors:
                table.add_row(pattern, *_cells(rows))
        if vectors:
            size = f"{sum(row.bytes_after for row in vectors) / 1e6:.2f}"
            table.add_row("vectors", str(len(vectors)), "", "kept", size, size, "", "vector")
        console.print(table)
        for line in self._lines():
            console.print(line, markup=False, highlight=False)

    def groups(self) -> list[tuple[str, list[WeightRow]]]:
        """Rows of repeated blocks together: names that differ in numbers only, all else the same."""
        grouped: dict[tuple[Any, ...], list[WeightRow]] = {}
        for row in self.rows:
            key = (
                re.sub(r"\d+", "*", row.name),
                row.shape,
                row.dtype,
                row.form,
                row.passes,
                row.reason,
                row.cut,
            )
            grouped.setdefault(key, []).append(row)
        return [(_pattern([row.name for row in rows]), rows) for rows in grouped.values()]

    def _lines(self) -> list[str]:
        totals = self.totals
        before, after = totals["bytes_before"] / 1e6, totals["bytes_after"] / 1e6
        lines = [
            f"total: {before:.2f} MB -> {after:.2f} MB ({totals['ratio']:.2f}x),"
            f" {totals['compressed']} of {totals['parameters']} parameters compressed"
        ]
        done, did = totals["products_after"], totals["products_before"]
        if done != did:
            lines.append(f"multiplications per token (or position): {did / 1e6:.2f} M -> {done / 1e6:.2f} M")
        if self.structure:
            lines += _structure_lines(self.structure)
        if self.relative_error is not None:
            scored = f", KL {self.kl:.3e} nats per token" if self.kl is not None else ""
            lines.append(f"end to end: relative error {self.relative_error:.3e}{scored}")
        for check in self.checks:
            lines.append(", ".join(f"{key}: {value}" for key, value in check.items()))
        for item in self.passes:
            if not item["edits"]:
                lines.append(f"note: pass {item['name']!r} changed nothing")
        return lines


def _structure_lines(structure: Mapping[str, Any]) -> list[str]:
    """What was cut, in words."""
    before, after = structure["before"], structure["after"]
    counts = [
        f"{before[key]:.4g} -> {after[key]:.4g} {words} ({after[key] / before[key] - 1:+.1%})"
        for key, words in (
            ("parameters", "parameters"),
            ("flops", f"operations per {before['tokens']} tokens"),
        )
        if before[key]
    ]
    removed = [entry for made in structure["rounds"] for entry in made["removed"]]
    lines = [f"structure: {', '.join(counts)}"]
    if removed:
        lines.append(f"removed: {', '.join(removed)}")
    return lines + ([f"module: {structure['module']}"] if "module" in structure else [])


def _cells(rows: Sequence[WeightRow]) -> list[str]:
    first = rows[0]
    errors = [row.error for row in rows if row.error is not None]
    shown = f"{max(errors):.1e}" if errors else ""
    return [
        str(len(rows)),
        _shape(first),
        first.form,
        f"{sum(row.bytes_before for row in rows) / 1e6:.2f}",
        f"{sum(row.bytes_after for row in rows) / 1e6:.2f}",
        shown,
        "; ".join(filter(None, (", ".join(first.passes), first.reason if first.form == "kept" else ""))),
    ]


def _shape(row: WeightRow) -> str:
    before = "×".join(map(str, row.shape)) or "scalar"
    return f"{before} → {'×'.join(map(str, row.cut))}" if row.cut else before


def _pattern(names: Sequence[str]) -> str:
    """``layers.0.w, layers.1.w`` → ``layers.{0–1}.w``."""
    if len(names) == 1:
        return names[0]
    split = [re.split(r"(\d+)", name) for name in names]
    parts = []
    for column in zip(*split, strict=True):
        numbers = sorted({int(part) for part in column}) if column[0].isdigit() else []
        parts.append(f"{{{numbers[0]}–{numbers[-1]}}}" if len(numbers) > 1 else column[0])
    return "".join(parts)


def describe_form(form: SiteForm) -> str:
    """A form in a few words: ``int4 asym g64 + int8 activations per token``."""
    parts = [term.describe() for term in form.terms]
    if form.activation is not None:
        parts.append(form.activation.describe())
    parts += [edge.describe() for edge in form.edges]
    parts += [form.cache.describe()] if form.cache is not None else []
    parts += [f"{transform.describe()} in" for transform in form.transform_in]
    parts += [f"{transform.describe()} out" for transform in form.transform_out]
    return " + ".join(parts)
