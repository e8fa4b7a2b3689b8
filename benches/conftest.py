"""`pytest benches --benchmark-only`: options, what is measured, and where the results go.

pytest-benchmark times one function after another on the host's clock; providers that are to be compared must be timed in turn,
and a GPU by its own events.  So the first test of a size has `Suite` measure all providers of that size, interleaved, with
the clock of `fastlora.benchmark`; and each test hands the times of its own provider and pass to pytest-benchmark, whose
clock here is `recorded_clock`: it stands still but for the recorded seconds, by which the function it times moves it.  Every
statistic, group, comparison and JSON file of pytest-benchmark is then of the interleaved times, one round for each of them.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grid
import pytest
import torch
from suite import BUDGETS, NotMeasuredError, Suite

from fastlora import benchmark
from fastlora.benchmark import results
from fastlora.benchmark.providers import COMPILERS
from fastlora.environment import environment

RESULTS = Path(__file__).parent / "results"
_SUITE = pytest.StashKey[Suite]()
_now = 0.0


def recorded_clock() -> float:
    """Seconds, moved by `recorded` alone."""
    return _now


def recorded(times: Iterator[float]) -> None:
    """What pytest-benchmark times: takes as long as was recorded."""
    global _now
    _now += next(times, 0.0)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlora benchmarks")
    group.addoption("--grid", choices=grid.NAMES, default="full", help="which sizes, see benches/grid.py (default: full)")
    group.addoption("--quick", action="store_const", const="quick", dest="grid", help="the grid quick: 2 minutes on a GPU")
    group.addoption("--device", type=torch.device, help="default: the GPU, else the CPU")
    group.addoption(
        "--compile",
        choices=(*COMPILERS, "none"),
        help="the backend of the providers under torch.compile (default: inductor on a GPU, none on a CPU)",
    )
    group.addoption("--repeats", type=int, default=20, help="timed rounds, fewer where they take long (default: 20)")
    group.addoption("--budget", type=float, help="seconds after which no size is begun (default on a GPU: 480, quick 120)")
    group.addoption("--resume", action="store_true", help="measure what the results file does not hold yet")
    group.addoption("--results", type=Path, default=RESULTS, help="folder of the results (default: benches/results)")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    name, toy = option.grid, option.grid == "toy"
    device = option.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_compiler = "inductor" if device.type == "cuda" else "none"
    compiler = option.compile or default_compiler
    budget = BUDGETS.get(name, float("inf")) if device.type == "cuda" else float("inf")
    option.results.mkdir(parents=True, exist_ok=True)
    config.stash[_SUITE] = Suite(
        option.results / f"{_slug(environment(device)['device'])}-{name}.json",
        device,
        repeats=option.repeats,
        compiler=None if compiler == "none" else compiler,
        budget=budget if option.budget is None else option.budget,
        resume=option.resume,
        copies=2 if toy else None,
        tell=lambda line: _tell(config, line),
    )


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _tell(config: pytest.Config, line: str) -> None:
    plugins: Any = config.pluginmanager
    reporter, capture = (plugins.get_plugin(name) for name in ("terminalreporter", "capturemanager"))
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each size, pass and provider."""
    if "size" not in metafunc.fixturenames:
        return
    suite = metafunc.config.stash[_SUITE]
    cases = [
        pytest.param(size, pass_, provider.name, id=f"{size.id}-{pass_}-{provider.name}".replace(" ", "-"))
        for size in grid.sizes(metafunc.config.option.grid, suite.device)
        for pass_ in benchmark.PASSES
        for provider in suite.providers(size)
    ]
    metafunc.parametrize(("size", "pass_", "provider"), cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The most telling linears, the models, the other linears: the time budget may end the run before the last ones."""
    first = {size.id for size in grid.most_telling(config.option.grid, config.stash[_SUITE].device)}

    def place(item: pytest.Item) -> int:
        size = item.callspec.params.get("size") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
        return 1 if not isinstance(size, grid.Size) else 0 if size.id in first else 2

    items.sort(key=place)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastlora"] = config.stash[_SUITE].facts


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    suite = config.stash[_SUITE]
    for line in suite.summary():
        terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SUITE in config.stash:
        config.stash[_SUITE].close()


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    """The run that the tests are part of."""
    return pytestconfig.stash[_SUITE]


@pytest.fixture(scope="session")
def toy(pytestconfig: pytest.Config) -> bool:
    """Whether the models are to be tiny."""
    return pytestconfig.option.grid == "toy"


@pytest.fixture
def record(benchmark: Any) -> Callable[..., None]:
    """Hand the seconds of a measurement and the rest of its row to pytest-benchmark."""

    def record(group: str, seconds: list[float], row: results.Row) -> None:
        benchmark.group = group
        benchmark.extra_info.update({key: value for key, value in row.items() if value is not None})
        benchmark.pedantic(recorded, args=(iter(seconds),), rounds=len(seconds))

    return record


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What is not measured is skipped, with the reason."""
    try:
        yield
    except NotMeasuredError as reason:
        pytest.skip(str(reason))
