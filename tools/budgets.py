"""What the gated kernels may cost, for each version of Triton: tests/compile/budgets.json.

A Triton wheel holds its whole compiler, so the same code always gives the same instructions.  A budget is therefore the cost
that was measured when it was recorded (`python -m tools.compile_report --record`).  A change that raises a cost records new
budgets and says why.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import triton

from tools.measure import KernelFacts

BUDGETS = Path(__file__).parents[1] / "tests" / "compile" / "budgets.json"


def cost(row: KernelFacts) -> dict[str, float]:
    """The budgeted costs: layout conversions, narrow loads, and instructions per masked element, rounded up to a half."""
    costs: dict[str, float] = {"conversions": row.conversions, "narrow_loads": row.sass.narrow_loads}
    if row.per_masked_element is not None:
        costs["per_masked_element"] = math.ceil(2 * row.per_masked_element) / 2
    return costs


def over_budget(row: KernelFacts, budget: Mapping[str, float]) -> list[str]:
    """The costs of a kernel that exceed its budget.  A cost that the budget does not name exceeds it."""
    return [
        f"{name}: {value:g}, the recorded budget is {budget.get(name, 'none')}"
        for name, value in cost(row).items()
        if value > budget.get(name, -math.inf)
    ]


@functools.cache
def recorded() -> dict[str, dict[str, float]]:
    """Budgets for the installed Triton by `KernelFacts.key`.  Empty for a version without records."""
    return _read().get(triton.__version__, {})


def record(rows: Iterable[KernelFacts]) -> None:
    """Store the costs of the kernels as the budgets of the installed Triton."""
    budgets = _read() | {triton.__version__: {row.key: cost(row) for row in rows}}
    entries = (
        (version, _object((key, json.dumps(value)) for key, value in costs.items())) for version, costs in budgets.items()
    )
    BUDGETS.write_text(_object(sorted(entries)) + "\n")
    recorded.cache_clear()


def _object(members: Iterable[tuple[str, str]]) -> str:
    """A JSON object with one line per member, for readable diffs."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {value}" for key, value in members) + "\n}"


def _read() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
