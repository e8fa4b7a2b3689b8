"""Progress on standard error: bars in a terminal, an occasional line elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fastlora.cli import common

LINES_PER_PHASE = 5

#: (phase, step, steps, losses by name, tokens per step), after every step.
AfterStep = Callable[[str, int, int, Mapping[str, float], int], None]


@contextmanager
def shown(silent: bool = False) -> Iterator[AfterStep]:
    """Show progress until the context ends; with `silent` show nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    name, figures = TextColumn("{task.description:<8}"), TextColumn("{task.fields[figures]}")
    remaining = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    console = common.consoles()[1]
    bars = Progress(name, BarColumn(bar_width=20), MofNCompleteColumn(), remaining, figures, console=console)
    bars.disable = silent or not console.is_terminal
    tasks: dict[str, TaskID] = {}

    def after_step(phase: str, step: int, steps: int, losses: Mapping[str, float], tokens: int) -> None:
        if phase not in tasks:
            tasks[phase] = bars.add_task(phase, total=steps, figures="")
        bars.update(tasks[phase], completed=step)
        speed = bars.tasks[tasks[phase]].speed  # in steps per second; unknown after the first step
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        text += f"  {speed * tokens:,.0f} tokens/s" if speed else ""
        bars.update(tasks[phase], figures=text)
        if not silent and bars.disable and step * LINES_PER_PHASE // steps > (step - 1) * LINES_PER_PHASE // steps:
            console.print(f"{phase:<8} {step:>5}/{steps}  {text}", soft_wrap=True)

    with bars:
        yield after_step
