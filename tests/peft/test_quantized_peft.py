"""QLoRA: a tiny Llama on linears of bitsandbytes, torchao, HQQ, GPTQModel or FP8Linear, wrapped by PEFT and accelerated."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from packed_layers import packed, stand_ins
from peft import prepare_model_for_kbit_training
from peft_models import PRECISIONS, Judged, autocast, counted_calls, inputs_of, logits_of, states_equal, wrap
from quantized_layers import KINDS
from quantized_models import dense, quantized_llama, with_linears
from torch import nn

import fastlora
from fastlora import oracle
from fastlora.peft import layers

PROJECTIONS = 14


def pair(kind: str, **options: torch.dtype | None) -> tuple[nn.Module, nn.Module]:
    """PEFT's model, and an accelerated copy."""
    model = wrap(quantized_llama(kind, **options))
    fused = copy.deepcopy(model)
    fastlora.accelerate(fused)
    return model, fused


#: Every packing and every mixture of dtypes, with and without dropout; int8 under autocast from float32 falls back, see below.
CASES = [(kind, precision, 0.3) for kind in KINDS for precision in ("float32", "mixed-autocast")] + [
    ("nf4 double", "mixed", 0.0),
    ("nf4 double", "autocast", 0.0),
    ("nf4 double", "autocast", 0.3),
    ("fp4", "mixed", 0.3),
    ("int8", "mixed", 0.0),
]


@pytest.mark.parametrize(("kind", "precision", "dropout_p"), CASES)
def test_logits_and_every_gradient(kind, precision, dropout_p):
    dtype, autocast_dtype = PRECISIONS[precision]
    model = quantized_llama(kind, dtype, compute_dtype=autocast_dtype)
    judge = Judged(wrap(model, lora_dropout=dropout_p), autocast_dtype, exact=dense)
    compute = autocast_dtype or dtype
    draws = 2 if compute == torch.float32 else 4
    with counted_calls() as calls:
        for draw in range(draws):
            judge.add(inputs_of(seed=draw), seed=draw)
    assert len(calls) == draws * PROJECTIONS
    assert not judge.failures(oracle.FLOOR[compute, compute])
    assert not fastlora.peft.fallbacks(judge.fused)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_unchanged(kind):
    """By `accelerate`, by forward and backward, and by `decelerate`."""
    model = wrap(quantized_llama(kind))
    before = copy.deepcopy(model)
    fastlora.accelerate(model)
    logits_of(model).sum().backward()
    assert states_equal(before, model)
    assert fastlora.decelerate(model) == PROJECTIONS
    assert states_equal(before, model)
    assert {type(layer).__module__ for layer in layers.find(model).values()} == {"peft.tuners.lora.bnb"}


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_merging_stays_pefts(kind):
    both = model, fused = pair(kind)
    with counted_calls() as calls:
        for each in both:
            with pytest.warns(UserWarning, match="Merge lora module to"):
                each.merge_adapter()
        assert states_equal(model, fused)
        assert torch.equal(logits_of(fused), logits_of(model))
        assert not calls
        with pytest.warns(UserWarning, match="Unmerge lora module to"):
            fused.unmerge_adapter()
        logits_of(fused)
    assert len(calls) == PROJECTIONS


@pytest.mark.parametrize(("x", "fused"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer trains through PEFT's own forward")
def test_a_call_that_mixes_dtypes_is_pefts(x, fused):
    """The dtype that each layer answers in is bitsandbytes'. test_quantized_layers.py has every mixture."""
    both = pair("nf4", compute_dtype=torch.bfloat16)
    with counted_calls() as calls:
        y, expected = (each.base_model.model.model.layers[1].mlp.up_proj(torch.randn(7, 32).to(x)) for each in both)
    assert y.dtype == expected.dtype
    assert bool(calls) == fused
    told = "its base layer computes in torch.bfloat16 on an input in torch.float32"
    assert [reason.startswith(told) for reason in fastlora.peft.fallbacks(both[1])] == [True] * (not fused)


def test_the_usual_qlora_recipe():
    """Norms, and so hidden states, in float32; compute dtype and autocast bfloat16; activations are checkpointed."""
    model = quantized_llama("nf4 double", torch.bfloat16, compute_dtype=torch.bfloat16)
    model = wrap(prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False}))
    report = fastlora.accelerate(model)
    assert len(report.taken) == PROJECTIONS
    assert not report.left
    with autocast(torch.bfloat16), counted_calls() as calls:
        logits_of(model).float().square().mean().backward()
    assert len(calls) == 2 * PROJECTIONS, "forward and its repetition"
    assert not fastlora.peft.fallbacks(model)
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name)


def test_layers_that_are_not_quantised_yet_are_left():
    model = quantized_llama("nf4")
    model.model.layers[0].self_attn.q_proj = Linear4bit(32, 32, bias=False)
    with pytest.warns(UserWarning, match="not quantised yet"):
        report = fastlora.accelerate(wrap(model))
    told = "its base layer is not quantised yet: move it to a device first"
    assert report.left == (("base_model.model.model.layers.0.self_attn.q_proj", told),)


# Other libraries' formats.

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULES = {"torchao": "torchao", "hqq": "hqq", "gptq": "gptq", "awq": "awq", "fp8": "layer"}


@pytest.fixture
def _stand_ins():
    with stand_ins():
        yield


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
@pytest.mark.parametrize("precision", ["float32", "mixed", "mixed-autocast"])
@pytest.mark.parametrize(
    "name", ["torchao int8", "torchao float8", "torchao int4", "hqq 4 axis 1", "gptq 4", "awq", "fp8 cut blocks"]
)
def test_other_formats(name, precision):
    """Logits and every gradient with float32 adapters and dropout; PEFT's own classes come back."""
    dtype, autocast_dtype = PRECISIONS[precision]
    model = wrap(with_linears(dtype, lambda weight: packed(name, weight)[0]), lora_dropout=0.3, target_modules=TARGETS)
    judge = Judged(model, autocast_dtype, exact=dense)
    with counted_calls() as calls:
        for draw in range(3):
            judge.add(inputs_of(seed=draw), seed=draw)
    assert len(calls) == 3 * PROJECTIONS
    assert not judge.failures(oracle.FLOOR[dtype, dtype])
    assert not fastlora.peft.fallbacks(judge.fused)
    assert fastlora.decelerate(judge.fused) == PROJECTIONS
    kinds = {type(layer) for layer in layers.find(model).values()}
    assert {type(layer) for layer in layers.find(judge.fused).values()} == kinds
    assert {kind.__module__ for kind in kinds} == {f"peft.tuners.lora.{MODULES[name.split()[0]]}"}
