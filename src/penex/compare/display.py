"""What the person at the terminal sees while the comparison runs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """One live bar on a terminal; elsewhere, where a bar would fill a log, one line per run."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def stage(self, title: str, total: int, done: Callable[[], int]) -> Iterator[None]:
        """Show `title` and how many of `total` epochs are `done` (asked a few times a second)."""
        if not self.console.is_terminal:
            self.console.print(f"{title}: {done()} of {total} epochs done")
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("epochs ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
        )
        with _Polling(*columns, console=self.console, transient=True) as progress:
            progress.watch(title, total, done)
            yield

    def note(self, line: str) -> None:
        """Say something that stays."""
        self.console.print(line, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Say something that the user may want to change."""
        self.console.print(f"Warning: {line}", style="yellow", soft_wrap=True)

    def finished(self, line: str) -> None:
        """Report one finished piece of work; a terminal has the bar instead."""
        if not self.console.is_terminal:
            self.console.print(line)


class _Polling(Progress):
    """A progress bar whose state is asked for, as the work is done in other processes."""

    done: Callable[[], int] | None = None

    def watch(self, title: str, total: int, done: Callable[[], int]) -> None:
        self.watched = self.add_task(title, total=total, completed=done())
        self.done = done

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.done is not None:
            self.update(self.watched, completed=self.done())
        yield from super().get_renderables()
