"""Blocks and models of the suite: every contender is checked before it is timed, and what it saves and launches is counted."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benches import blocks, chained, decoder
from benches.setting import ATTENTION, CHAINED, COMPILED_PEFT, FASTLORA, FROZEN, LAYER, MLP, PEFT, SINGLE, contenders, setting
from benches.suite import STEPS
from fastlora import lora_linear, torch_backend
from fastlora.benchmark import PASSES, WrongResultError, saved_bytes
from fastlora.benchmark.launches import operations
from fastlora.peft import Report, accelerate

CPU = torch.device("cpu")
both_blocks = pytest.mark.parametrize("kind", blocks.BLOCKS)


@pytest.fixture(autouse=True)
def _fuse_small_calls(monkeypatch):
    monkeypatch.setattr(torch_backend, "BREAK_EVEN", 0)


def failed(name, error):
    raise error


def toy(kind, dtype=torch.float32, **options):
    return replace(setting(kind, CPU, toy=True, **options), dtype=dtype, adapter_dtype=dtype)


def judged(kind, name, change=lambda contender: contender, **options):
    """The oracle's rows of a contender of a block."""
    chosen = toy(kind, **options)
    tensors = blocks.draw(blocks.BLOCKS[kind], chosen, CPU, copies=1)
    return blocks.verify(name, change(blocks.contender(name, tensors, chosen, CPU)), tensors, chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_blocks
def test_every_contender_is_judged_by_all_outputs_and_gradients(kind, dtype):
    outputs, inputs, linears = {ATTENTION: (4, 2, 4), MLP: (1, 1, 3)}[kind]
    for name in contenders(None):
        rows = judged(kind, name, dtype=dtype)
        assert len(rows) == outputs + inputs + (2 * linears if name != FROZEN else 0)


@both_blocks
@pytest.mark.parametrize("name", [PEFT, COMPILED_PEFT, SINGLE, FASTLORA])
def test_another_mask_is_seen(kind, name):
    def other(contender):
        return replace(contender, masks=lambda widths: [*contender.masks(widths)[:-1], contender.masks(widths)[-1].flip(0)])

    judged(kind, name, compiler="aot_eager")
    with pytest.raises(WrongResultError, match=f"{name} is wrong"):
        judged(kind, name, other, compiler="aot_eager")


@pytest.mark.parametrize(
    ("planted", "wrong", "kind"),
    [
        ("_add_dx", lambda dx, dy, weights, scaling: dy @ weights[0], ATTENTION),
        ("_gated_backward", lambda dh, e, g: (F.silu(e) * g, dh * g, dh * F.silu(e)), MLP),
    ],
)
def test_a_wrong_gradient_of_a_block_is_seen(planted, wrong, kind, monkeypatch):
    monkeypatch.setattr(chained, planted, wrong)
    with pytest.raises(WrongResultError, match=r"dx0 .*OVER"):
        judged(kind, CHAINED)


def test_a_broken_contender_leaves_the_others(monkeypatch):
    monkeypatch.setattr(chained, "mlp", lambda *args: 1 / 0)
    errors = {}
    ready = STEPS[MLP](toy(MLP), CPU, errors.__setitem__, 1)
    assert list(errors) == [CHAINED]
    assert {name for name, _ in ready.steps} == {FROZEN, PEFT, SINGLE, FASTLORA}


@both_blocks
def test_what_a_block_saves(kind):
    """Frozen projections save nothing, chained ones their inputs, and fastlora's MLP less than its single linears."""
    chosen = toy(kind)
    ready = STEPS[kind](chosen, CPU, failed, 1)
    saved = {name: saved_bytes(ready.steps[name, PASSES[-1]], ready.parameters) for name in contenders(None)}
    row, hidden, intermediate = 4 * chosen.rows, chosen.decoder.hidden, chosen.decoder.intermediate
    exact = {ATTENTION: (0, 2 * hidden), MLP: (3 * intermediate, hidden + 2 * intermediate)}[kind]
    assert (saved[FROZEN], saved[CHAINED]) == (row * exact[0], row * exact[1])
    assert saved[FASTLORA] < saved[PEFT]
    assert (saved[FASTLORA] < saved[SINGLE]) == (kind == MLP)  # single linears share the storage of their x


def test_launches_on_a_cpu_are_the_operations_that_do_work():
    steps = STEPS[MLP](toy(MLP), CPU, failed, 1).steps
    assert operations(steps[FROZEN, "forward"]) == 3 + 2  # linears, silu, product
    assert operations(steps[FROZEN, PASSES[-1]]) == 5 + 3 + 3 + 1  # gradients of the same, and the sum of two dx
    x, W, A, B = (torch.randn(8, 8) for _ in range(4))
    assert operations(lambda: x.t().view(8, 8)[:4]) == 0
    assert operations(lambda: lora_linear(x, W, A, B, backend="torch")) >= 3  # what the operator runs, not the operator


def wrong_adapter(model, **options):
    for name, parameter in model.named_parameters():
        if "q_proj.lora_A" in name:
            parameter.data *= 1.001
    return accelerate(model, **options)


@pytest.mark.parametrize(
    ("name", "planted", "message"),
    [
        ("fastlora.accelerate", lambda model, **options: Report((), left=(("q_proj", "planted"),)), "left, planted"),
        ("fastlora.peft.fallbacks", lambda model: {"planted": {"q_proj": 1}}, "ran PEFT's forward"),
        ("fastlora.accelerate", wrong_adapter, "is wrong, so it is not timed"),
        ("fastlora.accelerate", lambda model, groups, mlp: accelerate(model, groups=False, mlp=mlp), "not computed as"),
    ],
)
def test_a_model_that_falls_back_or_is_wrong_is_not_called_fastlora(name, planted, message, monkeypatch):
    monkeypatch.setattr(name, planted)
    with pytest.raises(WrongResultError, match=message):
        decoder.layer_steps(toy(LAYER), CPU, failed, copies=1)


def test_what_a_layer_saves_does_not_depend_on_the_number_of_inputs():
    few, many = (STEPS[LAYER](toy(LAYER), CPU, failed, copies) for copies in (1, 3))
    key = FASTLORA, PASSES[-1]
    assert saved_bytes(few.steps[key], few.parameters) == saved_bytes(many.steps[key], many.parameters)


@pytest.mark.parametrize("kind", decoder.STEPS)
def test_models_in_16_bits_with_adapters_in_float32(kind):
    chosen = replace(toy(kind, torch.bfloat16), adapter_dtype=torch.float32)
    ready = STEPS[kind](chosen, CPU, failed, 1)
    assert {name for name, _ in ready.steps} == set(contenders(None))
