"""Progress on standard error: live bars in a terminal, an occasional line elsewhere, or nothing."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

LINES_PER_PHASE = 5


class Silent:
    """Shows nothing; also the interface of the other two, a context in which the object is called after every step."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def __call__(self, phase: str, step: int, steps: int, losses: dict[str, float], tokens: int) -> None:
        """Step `step` of `steps` in `phase` is done; its losses by name, and the tokens that a step takes."""

    def figures(self, phase: str, step: int, losses: dict[str, float], tokens: int) -> str:
        """Losses and, from the second step on, tokens per second since the first."""
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        if phase not in self.started:
            self.started[phase] = time.perf_counter()
            return text
        return f"{text}  {(step - 1) * tokens / (time.perf_counter() - self.started[phase]):,.0f} tokens/s"


class Bars(Silent):
    """A rich bar for each phase."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__()
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def __call__(self, phase: str, step: int, steps: int, losses: dict[str, float], tokens: int) -> None:
        """Move the phase's bar."""
        if phase not in self.tasks:
            self.tasks[phase] = self.progress.add_task(phase, total=steps, figures="")
        self.progress.update(self.tasks[phase], completed=step, figures=self.figures(phase, step, losses, tokens))


class Lines(Silent):
    """A plain line LINES_PER_PHASE times in each phase: for logs and pipes."""

    def __call__(self, phase: str, step: int, steps: int, losses: dict[str, float], tokens: int) -> None:
        """Print a line when its time has come."""
        figures = self.figures(phase, step, losses, tokens)
        if step * LINES_PER_PHASE // steps > (step - 1) * LINES_PER_PHASE // steps:
            print(f"{phase:<8} {step:>5}/{steps}  {figures}", file=sys.stderr, flush=True)


def choose(json: bool) -> Silent:
    """Nothing with --json, bars in a terminal, lines elsewhere."""
    if json:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()
