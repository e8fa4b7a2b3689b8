"""`pytest benches --benchmark-only`: options, what is measured, and where the results go.

pytest-benchmark times one function after another on the host's clock.  To be comparable, providers must be timed in turn, and
a GPU by its own events.  So the first test of a size has `Suite` measure all providers of that size with `fastlora.benchmark`,
interleaved.  Each test then replays the times of its own provider and pass to pytest-benchmark: the clock here,
`recorded_clock`, stands still except that `recorded`, the function it times, moves it by the recorded seconds.  So all
statistics, groups, comparisons and JSON files of pytest-benchmark show the interleaved times, one round for each.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import grid
from benches.setting import PASSES_OF
from benches.suite import BUDGETS, NotMeasuredError, Suite
from fastlora.benchmark import PASSES
from fastlora.benchmark.providers import COMPILERS
from fastlora.cli.common import default_device
from fastlora.environment import environment

RESULTS = Path(__file__).parents[1] / "build" / "benchmarks"
_SUITE = pytest.StashKey[Suite]()
_now = 0.0


def recorded_clock() -> float:
    """Seconds, moved by `recorded` alone."""
    return _now


def recorded(times: Iterator[float]) -> None:
    """What pytest-benchmark times: takes as long as the next recorded time."""
    global _now
    _now += next(times, 0.0)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlora benchmarks")
    group.addoption("--grid", choices=grid.NAMES, default="full", help="which sizes, see benches/grid.py (default: full)")
    group.addoption("--quick", action="store_const", const="quick", dest="grid", help="the grid quick: 2 minutes on a GPU")
    group.addoption("--device", type=torch.device, help="default: the GPU, else the CPU")
    compiler = "backend of torch.compile (default: inductor on a GPU, none on a CPU)"
    group.addoption("--compile", choices=(*COMPILERS, "none"), help=compiler)
    group.addoption("--repeats", type=int, default=20, help="timed rounds, fewer where they take long (default: 20)")
    group.addoption("--budget", type=float, help="no size begins after these seconds (default on a GPU: 480, quick 120)")
    group.addoption("--resume", action="store_true", help="measure only what the results file does not have yet")
    group.addoption("--results", type=Path, default=RESULTS, help="folder of the results (default: build/benchmarks)")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    device = option.device or default_device()
    on_gpu = device.type == "cuda"
    compiler = option.compile or ("inductor" if on_gpu else "none")
    budget = BUDGETS.get(option.grid, math.inf) if on_gpu else math.inf
    name = re.sub(r"[^a-z0-9]+", "-", environment(device)["device"].lower()).strip("-")
    option.results.mkdir(parents=True, exist_ok=True)
    config.stash[_SUITE] = Suite(
        option.results / f"{name}-{option.grid}.json",
        device,
        repeats=option.repeats,
        compiler=None if compiler == "none" else compiler,
        budget=budget if option.budget is None else option.budget,
        resume=option.resume,
        toy=option.grid == "toy",
        tell=lambda line: _tell(config, line),
    )


def _tell(config: pytest.Config, line: str) -> None:
    plugins: Any = config.pluginmanager
    reporter, capture = (plugins.get_plugin(name) for name in ("terminalreporter", "capturemanager"))
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each size, or kind of block or model, pass and provider."""
    suite = metafunc.config.stash[_SUITE]
    if "kind" in metafunc.fixturenames:
        found = [
            pytest.param(kind, pass_, name, id=f"{kind}-{pass_}-{name}".replace(",", "").replace(" ", "-"))
            for kind, passes in PASSES_OF.items()
            for pass_ in passes
            for name in suite.contenders()
        ]
        metafunc.parametrize(("kind", "pass_", "provider"), found)
    if "size" not in metafunc.fixturenames:
        return
    cases = [
        pytest.param(size, pass_, provider.name, id=f"{size.id}-{pass_}-{provider.name}".replace(" ", "-"))
        for size in grid.sizes(metafunc.config.option.grid, suite.device)
        for pass_ in PASSES
        for provider in suite.providers(size)
    ]
    metafunc.parametrize(("size", "pass_", "provider"), cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The most important linears, blocks and models, other linears: the time budget may end the run before the last ones."""
    first = {size.id for size in grid.most_important(config.option.grid, config.stash[_SUITE].device)}

    def place(item: pytest.Item) -> int:
        size = item.callspec.params.get("size") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
        return 1 if not isinstance(size, grid.Size) else 0 if size.id in first else 2

    items.sort(key=place)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastlora"] = config.stash[_SUITE].facts


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash[_SUITE].summary():
        terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SUITE in config.stash:
        config.stash[_SUITE].close()


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    """The run that the tests are part of."""
    return pytestconfig.stash[_SUITE]


@pytest.fixture
def record(benchmark: Any) -> Callable[..., None]:
    """Hand the seconds of a measurement and the rest of its row to pytest-benchmark."""

    def record(group: str, seconds: list[float], row: dict[str, Any]) -> None:
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
