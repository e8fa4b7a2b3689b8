"""One run of the suite: measures each size once, within a time budget, and keeps the results in a file that can be resumed."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import decoder
import torch
from grid import Size

from fastlora import benchmark
from fastlora.benchmark import results
from fastlora.benchmark.providers import NAMES
from fastlora.environment import environment

SECONDS_PER_SIZE = {"cuda": 1.5, "cpu": 30.0}  # of timed rounds, see `benchmark.measure`
BUDGETS = {"quick": 120.0, "full": 480.0}  # seconds on a GPU
WHOLE = (benchmark.PASSES[-1], decoder.TRAINING_STEP)


class NotMeasuredError(Exception):
    """Why there are no times: too little time or memory, or the size was measured by the run that this one resumes."""


class Suite:
    """Measures on demand what the tests ask for.

    Args:
        path: the results, a JSON file {"facts", "ceilings", "rows", "not_reached"}, rewritten after each size; beside it the
            rows as CSV, with the facts and the ceilings of its dtype in every row.
        compiler: of the providers under torch.compile; None leaves them out.
        budget: seconds after which no further size is begun.
        resume: keep the rows that the file holds from the same machine, versions, commit and repeats; measure only the others.
        copies: sets of inputs, see `benchmark.run`.
        tell: shows a line to the user.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        repeats: int,
        compiler: str | None,
        budget: float,
        resume: bool = False,
        copies: int | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.device, self.repeats, self.compiler = path, device, repeats, compiler
        self.copies, self.tell = copies, tell
        self.deadline = time.monotonic() + budget
        self.facts = {**environment(device), "repeats": repeats}
        self.content: dict[str, Any] = {"facts": self.facts, "ceilings": {}, "rows": [], "not_reached": []}
        if resume:
            self._resume()
        self.resumed = {row["id"] for row in self.content["rows"]}
        #: id -> what was measured under it, by provider; or provider -> why it was left out, None for all of them
        self._linears: dict[str, dict[str, benchmark.Measurement]] = {}
        self._models: dict[str, dict[tuple[str, str], list[float]]] = {}
        self._failed: dict[str, dict[str | None, Exception]] = {}
        self._ceilings: dict[torch.dtype, benchmark.Ceilings] = {}

    def providers(self, size: Size) -> list[benchmark.Provider]:
        """Who takes part in a size."""
        return benchmark.providers_for(size.case, self.device, compiler=self.compiler if size.compiled else None)

    def linear(self, size: Size, provider: str) -> tuple[benchmark.Measurement, list[results.Row]]:
        """What was measured of a provider, and its rows: one for each pass.

        Raises:
            NotMeasuredError: there is no measurement, and why.
            Exception: whatever the provider, or the measurement of the size, failed with.
        """
        self._once(size.id, lambda: self._measure(size))
        self._raise_failure(size.id, provider)
        return self._linears[size.id][provider], self._rows(size.id, provider)

    def layer(self, provider: str, pass_: str, *, toy: bool = False) -> tuple[list[float], results.Row]:
        """Seconds and row of a pass through a decoder layer; raises as `linear` does."""
        setting = decoder.layer_setting(self.device, toy=toy)
        return self._model(decoder.LAYER, setting, lambda: decoder.Layer(setting, self.device, self.copies), provider, pass_)

    def training(self, provider: str, *, toy: bool = False) -> tuple[list[float], results.Row]:
        """Seconds and row of a training step; raises as `linear` does."""
        setting = decoder.model_setting(self.device, toy=toy)
        make = partial(decoder.Training, setting, self.device)  # made only if it is to be measured
        return self._model(decoder.TRAINING_STEP, setting, make, provider, decoder.TRAINING_STEP)

    def _rows(self, id_: str, provider: str) -> list[results.Row]:
        return [row for row in self.content["rows"] if (row["id"], row["provider"]) == (id_, provider)]

    def _once(self, id_: str, measure: Callable[[], None]) -> None:
        """Measure what is named `id_` unless that was tried before in this run."""
        if id_ in self.resumed:
            raise NotMeasuredError(f"measured before: {self.path}")
        if id_ not in self._failed:
            if time.monotonic() > self.deadline:
                self.content["not_reached"] = list(dict.fromkeys([*self.content["not_reached"], id_]))
                raise NotMeasuredError("the time budget is spent; --resume goes on from here")
            self._failed[id_] = {}
            try:
                measure()
            except Exception as error:  # raised below, and again for each test of what is named `id_`
                self._failed[id_][None] = error.with_traceback(None)  # its frames hold the tensors
        self._raise_failure(id_, None)

    def _raise_failure(self, id_: str, provider: str | None) -> None:
        error = self._failed[id_].get(provider)
        if isinstance(error, torch.OutOfMemoryError):
            raise NotMeasuredError(f"does not fit into the memory of {self.facts['device']}: {error}")
        if error is not None:
            raise error

    def _measure(self, size: Size) -> None:
        excluded: dict[str, Exception] = {}
        measurements = benchmark.run(
            self.providers(size),
            size.case,
            self.device,
            repeats=self.repeats,
            limit=SECONDS_PER_SIZE[self.device.type],
            copies=self.copies,
            excluded=excluded,
        )
        for name in NAMES[:2]:  # all rows are relative to these
            if name in excluded:
                raise excluded[name]
        self._failed[size.id].update(excluded)
        self._linears[size.id] = {measurement.provider: measurement for measurement in measurements}
        facts = {"kind": "linear", "id": size.id, "used_by": size.used_by, **results.facts_of(size.case)}
        ceilings = self.ceilings(size.case.dtype)
        self.add([{**facts, **row} for row in results.rows_of(measurements, size.case, ceilings)])

    def _model(
        self,
        kind: str,
        setting: decoder.Setting,
        make: Callable[[], decoder.Layer | decoder.Training],
        provider: str,
        pass_: str,
    ) -> tuple[list[float], results.Row]:
        def measure() -> None:
            steps = make().steps()
            limit = 4 * SECONDS_PER_SIZE[self.device.type]
            clock = benchmark.device_clock(self.device)
            self._models[kind] = benchmark.measure(steps, self.device, self.repeats, limit=limit, clock=clock)
            launches = benchmark.timed_launches(clock)
            rows = []
            for (name, step), seconds in self._models[kind].items():
                p20, median, p80 = (1e3 * second for second in benchmark.quantiles(seconds))
                peft = 1e3 * benchmark.quantiles(self._models[kind]["PEFT", step]).median
                memory = {
                    "peak_bytes": benchmark.peak_bytes(steps[name, step], self.device) if step in WHOLE else None,
                    "saved_bytes": None,
                }
                times = {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "over_eager": median / peft}
                launch = benchmark.quantiles(launches[name, step]).median * 1e3 if launches else None
                named = {**setting.facts(kind), "provider": name, "pass": step}
                rows.append({**named, **times, "launch_ms": launch, **memory})
            self.add(rows)

        self._once(kind, measure)
        row = next(row for row in self._rows(kind, provider) if row["pass"] == pass_)
        return self._models[kind][provider, pass_], row

    def ceilings(self, dtype: torch.dtype) -> benchmark.Ceilings:
        """Those of this run, measured when first asked for."""
        if dtype not in self._ceilings:
            self._ceilings[dtype] = found = benchmark.measure_ceilings(dtype, self.device)
            rates = {"gemm_tflops": found.gemm / 1e12, "copy_gbps": found.copy / 1e9}
            self.content["ceilings"][str(dtype).removeprefix("torch.")] = rates
        return self._ceilings[dtype]

    def add(self, rows: list[results.Row]) -> None:
        """Keep rows, write the file, and say how far the run is."""
        self.content["rows"] += rows
        results.write_json(self.content, self.path)
        whole = [row for row in rows if row["pass"] in WHOLE]
        times = ", ".join(f"{row['provider']} {row['median_ms']:.3g}" for row in whole)
        left = self.deadline - time.monotonic()
        budget = f"; {max(left, 0):.0f} s of the budget left" if math.isfinite(left) else ""
        self.tell(f"{rows[0]['id']}: {times} ms{budget}")

    def summary(self) -> list[str]:
        """What a user wants to know when the run is over."""
        lines = [f"results: {self.path} and {self.path.with_suffix('.csv').name}"] if self.content["rows"] else []
        if self.content["not_reached"]:
            lines.append(f"{len(self.content['not_reached'])} sizes were not reached in the time budget: --resume goes on")
        if scattered := results.scattered(self.content["rows"]):
            lines.append(f"{scattered} of {len(self.content['rows'])} times scatter widely: something else ran on this machine")
        return lines

    def close(self) -> None:
        """Write the final files, if there is anything to write."""
        if self.content["rows"]:
            results.write_json(self.content, self.path)
            ceilings = self.content["ceilings"]
            rows = [{**row, **ceilings.get(row["dtype"], {}), **self.facts} for row in self.content["rows"]]
            results.write_csv(rows, self.path.with_suffix(".csv"))

    def _resume(self) -> None:
        known = results.read_json(self.path)
        if known is None:
            return
        same = {key: value for key, value in self.facts.items() if key != "date"}
        if {key: value for key, value in known["facts"].items() if key != "date"} == same:
            self.content = {**known, "not_reached": []}
        else:
            self.tell(f"{self.path} was measured under other conditions: measuring anew")
