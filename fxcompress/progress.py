"""Progress of long work: a rich bar on a terminal, a callable for programs, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["ProgressEvent", "ProgressOption", "Reporter"]


@dataclass(frozen=True)
class ProgressEvent:
    """One finished step.

    Args:
        stage: Pass or check that is running.
        step: What was finished: a block's name.
        done: Steps of this stage finished.
        total: Steps of this stage.
        resumed: Whether the step was read from a checkpoint instead of computed.
    """

    stage: str
    step: str
    done: int
    total: int
    resumed: bool = False


ProgressOption: TypeAlias = bool | Callable[[ProgressEvent], None]


class Reporter:
    """Context manager around a run; leaves the terminal as it was however the run ends.

    Args:
        option: True for a bar on stderr (drawn only when that is a terminal), False for nothing, or a
            callable that gets every :class:`ProgressEvent`.
    """

    def __init__(self, option: ProgressOption = False) -> None:
        self._callback = option if callable(option) else None
        self._bars: Progress | None = None
        if option is True:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[step]}"),
            )
            console = Console(stderr=True)
            self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Reporter:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, stage: str, total: int) -> None:
        """Show a stage before its first step is finished."""
        if self._bars is not None and stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, step="")

    def step(self, event: ProgressEvent) -> None:
        """Tell that a step is finished."""
        if self._callback is not None:
            self._callback(event)
        if self._bars is not None:
            self.start(event.stage, event.total)
            note = f"{event.step} (resumed)" if event.resumed else event.step
            self._bars.update(self._tasks[event.stage], completed=event.done, step=note)
