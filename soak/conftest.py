"""How the soak runs: under Triton's interpreter, with a cache of its own, and with counts that SOAK scales.

make soak              the full counts, see docs/reliability.md
make soak SOAK=0.01    a hundredth of them, as a quick pass
"""

import os
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings

from soak.scale import scaled

EVERY = 20.0  # seconds between two progress lines

PHASES = [Phase.explicit, Phase.generate]  # to shrink a sequence takes longer than to read it
settings.register_profile(
    "soak", deadline=None, print_blob=True, database=None, phases=PHASES, suppress_health_check=list(HealthCheck)
)
settings.load_profile("soak")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The soak neither reads nor writes what the user has measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def small_calls_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of the soak are small, and an accelerated one leaves small calls on a CPU to PEFT's forward."""
    from fastlora import torch_backend

    monkeypatch.setattr(torch_backend, "BREAK_EVEN", 0)


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that name no backend take the torch backend, as on a CPU without the interpreter."""
    from fastlora import backends

    monkeypatch.setattr(backends, "INTERPRETING", False)


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Callable[[int], Iterator[int]]:
    """counted(full) yields 0, 1, ... up to SOAK times `full`, and prints a line now and then and at the end."""

    def numbers(full: int) -> Iterator[int]:
        total, start = scaled(full), time.monotonic()
        said = start
        for number in range(total):
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                print(f"\n{request.node.name}: {number:,} of {total:,} after {said - start:.0f} s", end="", flush=True)
            yield number
        print(f"\n{request.node.name}: {total:,} in {time.monotonic() - start:.1f} s ", end="", flush=True)

    return numbers
