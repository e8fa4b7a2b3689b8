"""The kernels, compiled for GPUs that need not be there: no spill, memory that exists, tensor cores, costs within budget."""

import pytest

from tools.budgets import over_budget, recorded
from tools.cases import Case, gated_cases
from tools.measure import faults, measure


@pytest.mark.parametrize("case", gated_cases(), ids=str)
def test_kernels(case: Case) -> None:
    rows = measure(case)
    assert rows
    complaints = [f"{row.key}: {fault}" for row in rows for fault in faults(row)]
    complaints += [f"{row.key}: {fault}" for row in rows for fault in over_budget(row, recorded().get(row.key, {}))]
    assert not complaints, "\n".join(complaints)
