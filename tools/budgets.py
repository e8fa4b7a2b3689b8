"""What the gated kernels may cost, as recorded for each version of Triton in tests/compile/budgets.json.

A Triton wheel holds its whole compiler and compiles the same code to the same instructions, so a budget is what was measured
when it was recorded (`python -m tools.compile_report --record`). Whoever makes a kernel dearer records anew, and says why.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import triton

from tools.measure import Row

BUDGETS = Path(__file__).parents[1] / "tests" / "compile" / "budgets.json"


def cost(row: Row) -> dict[str, float]:
    """What is budgeted: layout conversions, narrow loads, and instructions per masked element rounded up to a half."""
    costs: dict[str, float] = {"conversions": row.conversions, "narrow_loads": row.sass.narrow_loads}
    if row.per_masked_element is not None:
        costs["per_masked_element"] = math.ceil(2 * row.per_masked_element) / 2
    return costs


def over_budget(row: Row, budget: Mapping[str, float]) -> list[str]:
    """Where a row costs more than its budget; a cost the budget does not name is over it."""
    return [
        f"{name}: {value:g}, the recorded budget is {budget.get(name, 'none')}"
        for name, value in cost(row).items()
        if value > budget.get(name, -math.inf)
    ]


@functools.cache
def recorded() -> dict[str, dict[str, float]]:
    """Budgets for the installed Triton by `Row.key`; empty for a version that none were recorded for."""
    return _read().get(triton.__version__, {})


def record(rows: Iterable[Row]) -> None:
    """Make what the rows cost the budgets of the installed Triton."""
    budgets = _read() | {triton.__version__: {row.key: cost(row) for row in rows}}
    entries = (
        (version, _object((key, json.dumps(value)) for key, value in costs.items())) for version, costs in budgets.items()
    )
    BUDGETS.write_text(_object(sorted(entries)) + "\n")
    recorded.cache_clear()


def _object(members: Iterable[tuple[str, str]]) -> str:
    """A JSON object with a line for each member, which diffs well."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {value}" for key, value in members) + "\n}"


def _read() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
