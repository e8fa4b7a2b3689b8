"""`measure` times steps in turn and warm, and only the half of a step that counts."""

import contextlib

import pytest
import torch

from fastlora.benchmark import clock

CPU = torch.device("cpu")


def test_all_are_warm_and_visited_each_round_in_changing_order():
    visits, told = [], []

    def fake(name, step):
        step()
        return float(len(visits))

    steps = {name: lambda name=name: visits.append(name) for name in "abc"}
    seconds = clock.measure(steps, CPU, 5, clock=fake, progress=told.append)
    rounds = [tuple(visits[i : i + 3]) for i in range(0, len(visits), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(rounds) == len(told) == clock.WARMUP + 5
    assert len(set(rounds[clock.WARMUP :])) > 1
    assert {name: [visits[int(time) - 1] for time in times] for name, times in seconds.items()} == {n: [n] * 5 for n in "abc"}
    assert min(map(min, seconds.values())) == 3 * clock.WARMUP + 1


def test_only_the_second_half_of_a_prepared_step_is_timed(monkeypatch):
    now = 0.0

    def wait(seconds):
        nonlocal now
        now += seconds
        return seconds

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    step = clock.Prepared(lambda: wait(100.0) / 10, wait)
    seconds = clock.measure({"half": step, "whole": lambda: step()}, CPU, 4)
    assert seconds["half"] == pytest.approx([10.0] * 4)
    assert seconds["whole"] == pytest.approx([110.0] * 4)
    assert len(clock.measure({"half": step}, CPU, 100, limit=20 * 110.0)["half"]) == 21
    assert len(clock.measure({"half": step}, CPU, 100, limit=1.0)["half"]) == clock.FEWEST_ROUNDS


def test_cuda_events_enclose_the_run_and_the_device_waits_for_the_host(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("wait" if cycles else "no wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    step = clock.Prepared(lambda: log.append("setup"), lambda _: log.append("run"))
    timer = clock.CudaClock(torch.device("cuda"))
    assert clock.measure({"step": step}, torch.device("cuda"), 1, clock=timer) == {"step": [0.25]}
    visit = ["event", "run", "event", "synchronize"]
    assert log == ["setup", "no wait", *visit, *["setup", "wait", *visit] * clock.WARMUP]
    assert len(timer.launches["step"]) == clock.WARMUP + 1


@pytest.mark.parametrize(("nbytes", "copies"), [(1, 32), (10 << 20, 4), (1 << 30, 2)])
def test_inputs_exceed_the_cache(nbytes, copies, monkeypatch):
    assert 1 << 16 <= clock.cache_bytes(CPU) < 1 << 32
    monkeypatch.setattr(clock, "cache_bytes", lambda device: 20 << 20)
    assert clock.copies_beyond_cache(nbytes, CPU) == copies


def test_quantiles():
    assert clock.quantiles([4.0, 5.0, 6.0, 7.0, 8.0]) == pytest.approx((4.8, 6.0, 7.2))
    assert clock.quantiles([2.0]) == (2.0, 2.0, 2.0)
