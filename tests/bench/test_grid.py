"""The sizes of `pytest benches`, their order, and the models that they come from."""

import itertools

import pytest
import torch

from benches import grid
from benches.shapes import MODELS

CPU = torch.device("cpu")


def test_the_models_come_after_the_most_important_linears():
    class Collected:
        def pytest_collection_finish(self, session):
            self.names = [(item.path.stem, item.name) for item in session.items]

    run = Collected()
    assert pytest.main(["benches", "--collect-only", "-q", "--device", "cpu", "-p", "no:cacheprovider"], plugins=[run]) == 0
    (first, important), (models, _), (last, others) = (
        (file, [name for _, name in found]) for file, found in itertools.groupby(run.names, lambda item: item[0])
    )
    assert (first, models, last) == ("test_linears", "test_decoder", "test_linears")
    assert all("2048x1024x1024-r16" in name for name in important)
    assert not any("2048x1024x1024-r16" in name for name in others)


@pytest.mark.parametrize(("name", "count"), [("quick", 11), ("full", 142), ("everything", 19 * 64 + 6)])
def test_every_grid_starts_at_the_centre_and_has_no_case_twice(name, count):
    sizes = grid.sizes(name, torch.device("cuda"))
    assert len({size.id for size in sizes}) == len(sizes) == count
    assert (sizes[0].id, sizes[0].compiled) == ("bf16-8192x4096x4096-r16-p0.1", True)
    assert all(size.case.shape[0] <= 2048 for size in grid.sizes(name, CPU))


def square(name):
    """(M, r, p, dtype of the adapters) of each case of the centre's linear."""
    cases = [size.case for size in grid.sizes(name, torch.device("cuda")) if size.case.shape[1:] == (4096, 4096)]
    return {(case.shape[0], case.rank, case.dropout_p, case.adapters) for case in cases}


@pytest.mark.parametrize("name", ["full", "everything"])
def test_full_has_every_combination_at_the_centre_and_every_linear_at_every_m(name):
    assert len(square(name)) == 4 * 4 * 2 * 2 + 3 * 2
    assert {(rows, 16, p, torch.bfloat16) for rows in (1, 16, 128) for p in (0.0, 0.1)} <= square(name)
    sizes = {(size.case.shape, size.case.bias): size for size in reversed(grid.sizes(name, torch.device("cuda")))}
    for (model, decoder), rows in itertools.product(MODELS.items(), grid.ROWS):
        for linear in decoder.linears:
            size = sizes[(rows, linear.in_features, linear.out_features), linear.bias]
            assert f"{model} {', '.join(linear.names)}" in size.used_by


@pytest.mark.parametrize(
    ("name", "published"),
    {
        "Llama-3.2-1B": 1.236e9,
        "Llama-3.1-8B": 8.03e9,
        "Llama-3.1-70B": 70.55e9,
        "Qwen3-8B": 8.19e9,
        "Qwen2.5-32B": 32.76e9,
    }.items(),
)
def test_the_linears_of_a_model_make_up_its_published_parameter_count(name, published):
    decoder = MODELS[name]
    layer = sum(len(linear.names) * linear.in_features * linear.out_features for linear in decoder.linears)
    tied = name == "Llama-3.2-1B"  # its head is its embedding
    assert decoder.layers * layer + decoder.vocabulary * decoder.hidden * (2 - tied) == pytest.approx(published, rel=2e-3)
    found = {name: linear.bias for linear in decoder.linears for name in linear.names}
    assert found.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with_bias = {"q_proj", "k_proj", "v_proj"} if name == "Qwen2.5-32B" else set()
    assert {name for name, bias in found.items() if bias} == with_bias
