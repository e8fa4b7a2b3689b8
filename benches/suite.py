"""One run of the suite: measures each size once, within a time budget, and keeps the results in a file that can be resumed."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benches import blocks, decoder
from benches.grid import Size
from benches.setting import CHAINED, FROZEN, PEFT, Ready, contenders, setting
from fastlora import atomic, benchmark
from fastlora.benchmark import ceilings, providers, results, trial
from fastlora.cli.common import three_digits
from fastlora.environment import environment

STEPS: dict[str, Callable[..., Ready]] = {**blocks.STEPS, **decoder.STEPS}  # by kind
SECONDS_PER_SIZE = {"cuda": 1.5, "cpu": 30.0}  # of timed rounds, see `measure`
BUDGETS = {"quick": 120.0, "full": 480.0}  # seconds on a GPU


class NotMeasuredError(Exception):
    """Why there are no times: too little time or memory, or the run that is resumed measured the size."""


class Suite:
    """Measures what the tests ask for, when the first test asks.

    Args:
        path: the results, a JSON file {"facts", "ceilings", "rows", "not_reached"}, rewritten after each size.  A CSV file
            beside it has the same rows, each with the facts and the ceilings of its dtype.
        compiler: of the providers under torch.compile; None leaves them out.
        budget: no size begins later than this many seconds after the start.
        resume: keep the rows of the file if machine, versions, commit and repeats are the same; measure only the others.
        toy: tiny models, and two sets of inputs.
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
        toy: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.device, self.repeats, self.compiler = path, device, repeats, compiler
        self.toy, self.copies, self.tell = toy, 2 if toy else None, tell
        self.deadline = time.monotonic() + budget
        self.limit = SECONDS_PER_SIZE[device.type]
        self.facts = {**environment(device), "repeats": repeats}
        self.content: dict[str, Any] = {"facts": self.facts, "ceilings": {}, "rows": [], "not_reached": []}
        if resume:
            self._resume()
        self.resumed = {row["id"] for row in self.content["rows"]}
        self._seconds: dict[tuple[str, str, str], list[float]] = {}  # by id, provider and pass
        self._failed: dict[str, dict[str | None, Exception]] = {}  # id -> provider, or None for all of them -> why
        self._ceilings: dict[torch.dtype, ceilings.Ceilings] = {}

    def providers(self, size: Size) -> list[providers.Provider]:
        """Who takes part in a size."""
        return providers.providers_for(size.case, self.device, compiler=self.compiler if size.compiled else None)

    def linear(self, size: Size, provider: str, pass_: str) -> tuple[list[float], dict[str, Any]]:
        """Seconds and row of a pass of a provider.

        Raises:
            NotMeasuredError: there is no measurement, and why.
            Exception: whatever the provider, or the measurement of the size, failed with.
        """

        def failed(rival: providers.Provider, error: Exception) -> None:
            if rival.name in (providers.FROZEN, providers.EAGER):  # all rows relate to these
                raise error
            self._failed[size.id][rival.name] = error.with_traceback(None)  # its frames hold the tensors

        def measure() -> None:
            options: dict[str, Any] = {"repeats": self.repeats, "limit": self.limit, "copies": self.copies}
            rows, seconds = benchmark.run(self.providers(size), size.case, self.device, failed=failed, **options)
            facts = {"kind": "linear", "id": size.id, "used_by": size.used_by}
            self._add(facts, results.linear_rows(rows, size.case, self._ceilings_of(size.case.dtype)), seconds)

        return self._get(size.id, measure, provider, pass_)

    def contenders(self) -> tuple[str, ...]:
        """Who takes part in a block or a model."""
        return contenders(self.compiler)

    def model(self, kind: str, provider: str, pass_: str) -> tuple[list[float], dict[str, Any]]:
        """Seconds and row of a pass of a block or a decoder layer, or of a training step; raises as `linear` does."""

        def failed(name: str, error: Exception) -> None:
            if name in (FROZEN, PEFT):  # all rows relate to these
                raise error
            self._failed[kind][name] = error.with_traceback(None)  # its frames hold the tensors

        def measure() -> None:
            chosen = setting(kind, self.device, compiler=self.compiler, toy=self.toy)
            ready = STEPS[kind](chosen, self.device, failed, self.copies)
            ratios = {"over_frozen": FROZEN, "over_eager": PEFT}
            options: dict[str, Any] = {"repeats": self.repeats, "limit": 4 * self.limit}
            rows, seconds = trial.timed(ready.steps, self.device, ratios, ready.parameters, **options)
            self._add(chosen.facts(kind), [row | ({"p": 0.0} if row["provider"] == CHAINED else {}) for row in rows], seconds)

        return self._get(kind, measure, provider, pass_)

    def _get(self, id_: str, measure: Callable[[], None], provider: str, pass_: str) -> tuple[list[float], dict[str, Any]]:
        """What was measured under `id_`, after measuring it unless that was tried before in this run."""
        if id_ in self.resumed:
            raise NotMeasuredError(f"measured before: {self.path}")
        if id_ not in self._failed:
            if time.monotonic() > self.deadline:
                self.content["not_reached"] = list(dict.fromkeys([*self.content["not_reached"], id_]))
                raise NotMeasuredError("the time budget is spent; --resume continues from here")
            self._failed[id_] = {}
            try:
                measure()
            except Exception as error:  # raised below, for each test of `id_`
                self._failed[id_][None] = error.with_traceback(None)  # its frames hold the tensors
        failure = self._failed[id_].get(None) or self._failed[id_].get(provider)
        if isinstance(failure, torch.OutOfMemoryError):
            raise NotMeasuredError(f"does not fit into the memory of {self.facts['device']}: {failure}")
        if failure is not None:
            raise failure
        key = id_, provider, pass_
        row = next(row for row in self.content["rows"] if (row["id"], row["provider"], row["pass"]) == key)
        return self._seconds[key], row

    def _ceilings_of(self, dtype: torch.dtype) -> ceilings.Ceilings:
        """Those of this run, measured when first asked for."""
        if dtype not in self._ceilings:
            self._ceilings[dtype] = ceilings.measure_ceilings(dtype, self.device)
            self.content["ceilings"][str(dtype).removeprefix("torch.")] = self._ceilings[dtype]._asdict()
        return self._ceilings[dtype]

    def _add(self, facts: Mapping[str, Any], rows: list[dict[str, Any]], seconds: Mapping[trial.Key, list[float]]) -> None:
        """Keep rows, write the file, and report progress."""
        self._seconds |= {(facts["id"], *key): times for key, times in seconds.items()}
        self.content["rows"] += [{**facts, **row} for row in rows]
        self._write()
        times = ", ".join(
            f"{row['provider']} {three_digits(row['median_ms'])}" for row in rows if row["pass"] == rows[-1]["pass"]
        )
        left = self.deadline - time.monotonic()
        budget = f"; {max(left, 0):.0f} s of the budget left" if math.isfinite(left) else ""
        self.tell(f"{facts['id']}: {times} ms{budget}")

    def summary(self) -> list[str]:
        """What to tell the user when the run is over."""
        lines = [f"results: {self.path} and {self.path.with_suffix('.csv').name}"] if self.content["rows"] else []
        if self.content["not_reached"]:
            lines.append(f"{len(self.content['not_reached'])} sizes were not reached in the time budget: --resume continues")
        if scattered := results.scattered(self.content["rows"]):
            lines.append(f"{scattered} of {len(self.content['rows'])} times scatter widely: something else ran on this machine")
        return lines

    def close(self) -> None:
        """Write the final files, if there is anything to write."""
        if self.content["rows"]:
            self._write()
            rates = self.content["ceilings"]
            rows = [{**row, **rates.get(row["dtype"], {}), **self.facts} for row in self.content["rows"]]
            results.write_csv(rows, self.path.with_suffix(".csv"))

    def _write(self) -> None:
        """Replace the file at once: an interrupted run leaves the previous one."""
        atomic.write(self.path, json.dumps(self.content, indent=1).encode() + b"\n")

    def _resume(self) -> None:
        if not self.path.exists():
            return
        known = json.loads(self.path.read_text())
        if {**known["facts"], "date": ""} == {**self.facts, "date": ""}:
            self.content = {**known, "not_reached": []}
        else:
            self.tell(f"{self.path} was measured under other conditions: measuring anew")
