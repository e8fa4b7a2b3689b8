"""The kernels, compiled for GPUs that need not be there: no spill, memory that exists, tensor cores, costs within budget."""

import pytest
import triton

from tools.budgets import over_budget, recorded
from tools.cases import Case, gated_cases
from tools.measure import faults, measure


@pytest.mark.parametrize("case", gated_cases(), ids=str)
def test_kernels(case: Case) -> None:
    rows = measure(case)
    assert rows
    complaints = [f"{row.key}: {fault}" for row in rows for fault in faults(row)]
    if budgets := recorded():
        complaints += [f"{row.key}: {fault}" for row in rows for fault in over_budget(row, budgets.get(row.key, {}))]
    assert not complaints, "\n".join(complaints)


def test_budgets_are_recorded() -> None:
    if not recorded():
        pytest.skip(f"no budgets for Triton {triton.__version__}: python -m tools.compile_report --record")
