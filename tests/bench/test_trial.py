"""A trial checks every provider against float64, each with its own mask, before it times them on the same inputs."""

import functools
import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import benchmark, oracle
from fastlora.benchmark import WrongResultError, clock, providers, trial
from fastlora.benchmark.providers import of_call, providers_for
from fastlora.oracle import Case

CPU = torch.device("cpu")
CASE = Case((96, 64, 80), rank=4, dropout_p=0.1, bias=False)
in_all_dtypes = pytest.mark.parametrize("dtypes", oracle.DTYPES, ids=lambda pair: "+".join(map(oracle.SHORT.get, pair)))


def judge_of(case):
    """verify(provider), on the same inputs each time."""
    return functools.partial(trial.verify, case=case, inputs=trial.draw(case, CPU), known={})


@in_all_dtypes
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_every_provider_is_judged_with_its_own_mask(dtypes, dropout_p):
    case = Case((96, 64, 80), 4, *dtypes, dropout_p=dropout_p)
    judge, rivals = judge_of(case), providers_for(case, CPU)
    chained = ["chained addmm_"] if dtypes[0] == dtypes[1] else []
    assert [provider.name for provider in rivals] == ["frozen linear", "eager LoRA", "PEFT", *chained, "fastlora"]
    for provider in rivals:
        outputs = [row.output for row in judge(provider)]
        assert outputs == (["y", "dx", "dA", "dB"] if provider.name != "frozen linear" else ["y", "dx"])


def other_mask(rows, cols, p, device):
    return torch.rand(rows, cols) >= p


def test_under_torch_compile_each_is_judged_with_the_mask_of_the_compiled_graph():
    judge, rivals = judge_of(CASE), providers_for(CASE, CPU, compiler="aot_eager")
    here = [name for name in providers.NAMES if name not in ("fastlora fused", "fastlora addmm")]
    assert [provider.name for provider in rivals] == here
    for provider in rivals:
        if provider.name in providers.COMPILED:
            judge(provider)
            with pytest.raises(WrongResultError, match="is wrong on"):
                judge(replace(provider, mask=other_mask))


def changed(change):
    return {"bind": of_call(lambda *tensors, **options: change(providers.eager_lora(*tensors, **options)))}


@pytest.mark.parametrize(
    "change",
    [
        {"mask": other_mask},
        {"keep_scale": lambda p: 1.0},
        {"bind": of_call(providers.frozen_linear)},
        changed(lambda y: y * 1.01),
        changed(Tensor.double),
        {"bind": of_call(lambda x, *rest, **options: providers.eager_lora(x.detach(), *rest, **options))},
    ],
    ids=["mask", "scale", "no adapter", "factor", "dtype", "no gradient"],
)
def test_a_wrong_provider_is_not_timed(change, monkeypatch):
    frozen, eager = providers_for(CASE, CPU)[:2]
    planted = replace(eager, name="planted", **change)
    with monkeypatch.context() as patch:
        patch.setattr(trial, "measure", lambda *args, **options: pytest.fail("timed"))
        with pytest.raises(WrongResultError, match="planted is wrong on f32 96x64x80"):
            benchmark.run([frozen, eager, planted], CASE, CPU, repeats=1)
    failed = mock.Mock()
    rows, _ = benchmark.run([frozen, eager, planted], CASE, CPU, repeats=1, copies=1, failed=failed)
    assert {row["provider"] for row in rows} == {"frozen linear", "eager LoRA"}
    failed.assert_called_once_with(planted, mock.ANY)


@in_all_dtypes
def test_eager_is_peft(dtypes):
    """The provider called eager is PEFT's layer, bit for bit, forward and backward, its dropout included."""
    case = Case((96, 64, 80), 4, *dtypes, dropout_p=0.1)
    inputs, both = trial.draw(case, CPU), []
    for provider in providers_for(case, CPU)[1:3]:
        forward = provider.bind(inputs.weights, 1.5, 0.1)
        torch.manual_seed(3)
        y = forward(inputs.x)
        both.append([y, *torch.autograd.grad(y, trial.trained(provider, inputs), inputs.dy)])
    assert all(torch.equal(ours, of_peft) for ours, of_peft in zip(*both, strict=True))


def test_steps_take_the_sets_in_turn():
    """Every call runs on the next set of inputs, and backward on the set of its own forward."""
    frozen = providers_for(CASE, CPU)[0]
    sets = [trial.draw(CASE, CPU, index) for index in range(3)]
    assert len({float(inputs.dy.sum()) for inputs in sets}) == 3
    forward, backward, both = trial.steps_of(frozen, CASE, sets, itertools.cycle(range(3))).values()
    for inputs in (*sets, sets[0]):
        assert torch.equal(forward()[1], F.linear(inputs.x, inputs.weight))
    for step, inputs in ((backward, sets[1]), (both, sets[2])):
        assert torch.equal(step()[0], inputs.dy @ inputs.weight)


def test_no_two_steps_in_succession_read_the_same_set():
    """What one provider has left in the cache is not what the next one reads."""
    read = []

    def spied(bind):
        def bound(*args):
            forward = bind(*args)
            return lambda x: read.append(x.data_ptr()) or forward(x)

        return bound

    rivals = [replace(rival, bind=spied(rival.bind)) for rival in providers_for(CASE, CPU)[:3]]
    benchmark.run(rivals, CASE, CPU, repeats=4, copies=3)
    timed = read[len(rivals) : -3 * len(rivals)]  # before, each was checked; after, bytes and launches were counted
    assert len(timed) == 3 * len(rivals) * (clock.WARMUP + 4)
    assert timed == timed[:3] * (len(timed) // 3)
    assert len(set(timed)) == 3
