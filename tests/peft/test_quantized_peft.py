"""QLoRA: a tiny Llama on 4-bit and 8-bit linears of the real bitsandbytes, wrapped by PEFT and accelerated."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import prepare_model_for_kbit_training
from peft_models import build, counted_calls, inputs_of, logits_of, with_masked_dropout, wrap
from quantized_layers import KINDS, quantize
from test_peft_parity import PRECISIONS, Judged, autocast
from torch import nn

import fastlora
from fastlora import oracle, quantized
from fastlora.peft import layers

PROJECTIONS = 14


def quantized_llama(kind: str, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """The tiny Llama with every linear but the head quantised, as transformers loads it."""
    model = build("llama", dtype)
    options = {} if kind == "int8" else {"compute_dtype": compute_dtype}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantize(linear.weight, kind, **options))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return model


def dense(model: nn.Module) -> nn.Module:
    """A float64 copy of PEFT's model on the weights that the packed ones stand for."""
    model = copy.deepcopy(model)
    for layer in layers.find(model).values():
        weight = quantized.weight_of(layer.base_layer).dequantize(torch.float32)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        layer.base_layer = linear
    return model.double()


class QuantizedJudged(Judged):
    """Errors against the dense model in float64."""

    def __init__(self, model: nn.Module, autocast_dtype: torch.dtype | None = None) -> None:
        self.autocast_dtype, self.sums = autocast_dtype, {}
        self.fused = copy.deepcopy(model)
        self.eager = with_masked_dropout(model)
        self.truth = dense(self.eager)
        assert len(fastlora.accelerate(self.fused).taken) == PROJECTIONS


#: Every way of packing, every mixture of dtypes (int8 under autocast from float32 is a fallback, see below), without and with
#: dropout.
CASES = [(kind, precision, 0.3) for kind in KINDS for precision in ("float32", "mixed-autocast")] + [
    ("nf4 double", "mixed", 0.0),
    ("nf4 double", "autocast", 0.0),
    ("nf4 double", "autocast", 0.3),
    ("fp4", "mixed", 0.3),
    ("int8", "mixed", 0.0),
    ("int8", "float32", 0.0),
]


@pytest.mark.parametrize(("kind", "precision", "dropout_p"), CASES)
def test_logits_and_every_gradient(kind, precision, dropout_p):
    dtype, autocast_dtype = PRECISIONS[precision]
    model = quantized_llama(kind, dtype, compute_dtype=autocast_dtype)
    judge = QuantizedJudged(wrap(model, lora_dropout=dropout_p), autocast_dtype)
    with counted_calls() as calls:
        for draw in range(4):
            judge.add(inputs_of(seed=draw), seed=draw)
    compute = autocast_dtype or dtype
    assert len(calls) == 4 * PROJECTIONS
    assert not judge.failures(oracle.FLOOR[compute, compute])
    assert not fastlora.peft.fallbacks(judge.fused)


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_evaluation(kind):
    """Without PEFT's own beside it: on a CPU with AVX512-BF16 bitsandbytes refuses to infer with weights this small."""
    judge = QuantizedJudged(wrap(quantized_llama(kind)).eval())
    with torch.no_grad(), counted_calls() as calls:
        fused, truth = logits_of(judge.fused), logits_of(judge.truth)
    assert len(calls) == PROJECTIONS
    assert oracle.relative_error(fused, truth) <= oracle.FLOOR[torch.float32, torch.float32]


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_packed_weights_are_what_is_saved(kind):
    """Of the frozen weights nothing but the layers' own storage, and less in all than PEFT keeps."""
    model = wrap(quantized_llama(kind, torch.bfloat16), lora_dropout=0.1)
    model.enable_input_require_grads()  # or the first layers need no dx
    packed = {layer.base_layer.weight.data_ptr() for layer in layers.find(model).values()}

    def saved(model: nn.Module) -> dict[int, torch.Tensor]:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            logits_of(model)
        return kept

    eager = saved(copy.deepcopy(model))
    fastlora.accelerate(model)
    fused = saved(model)
    assert packed <= set(fused)
    assert sum(t.nbytes for at, t in fused.items() if at not in packed) < sum(t.nbytes for t in eager.values())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_unchanged(kind):
    """By accelerating, by a training step's forward and backward, and by the way back."""
    model = wrap(quantized_llama(kind))
    before = state(model)
    fastlora.accelerate(model)
    logits_of(model).sum().backward()
    for current in (state(model), state(model) if fastlora.decelerate(model) else {}):
        assert list(current) == list(before)
        assert all(torch.equal(current[name], before[name]) for name in before)
    assert not any(isinstance(module, layers.Fused) for module in model.modules())
    assert {type(layer).__module__ for layer in layers.find(model).values()} == {"peft.tuners.lora.bnb"}


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_merging_stays_pefts(kind):
    model = wrap(quantized_llama(kind))
    fused = copy.deepcopy(model)
    fastlora.accelerate(fused)
    for each in (model, fused):
        with pytest.warns(UserWarning, match="Merge lora module to"):
            each.merge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(fused).values(), strict=True))
    with counted_calls() as calls:
        assert torch.equal(logits_of(fused), logits_of(model))
    assert not calls
    for each in (model, fused):
        with pytest.warns(UserWarning, match="Unmerge lora module to"):
            each.unmerge_adapter()
    with counted_calls() as calls:
        logits_of(fused)
    assert len(calls) == PROJECTIONS


@pytest.mark.parametrize(
    ("kind", "compute_dtype", "autocast_dtype", "reason"),
    [
        ("nf4", torch.bfloat16, None, "computes in torch.bfloat16 on an input in torch.float32"),
        ("nf4", None, torch.bfloat16, "computes in torch.float32 on an input in torch.float32 under autocast"),
        ("int8", None, torch.bfloat16, "computes in torch.float32 on an input in torch.float32 under autocast"),
    ],
)
@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer trains through PEFT's own forward")
def test_calls_that_mix_dtypes_are_pefts(kind, compute_dtype, autocast_dtype, reason):
    model = wrap(quantized_llama(kind, compute_dtype=compute_dtype))
    fused = copy.deepcopy(model)
    fastlora.accelerate(fused)
    x = torch.randn(7, 32)
    with autocast(autocast_dtype), counted_calls() as calls:
        y, expected = (each.base_model.model.model.layers[1].mlp.up_proj(x) for each in (fused, model))
    assert torch.equal(y, expected)
    assert not calls
    ((told, counts),) = fastlora.peft.fallbacks(fused).items()
    assert told.startswith(f"its base layer {reason}")
    assert list(counts.values()) == [1]


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_a_layers_output_under_autocast(kind, dtype):
    """bitsandbytes answers in x's dtype, not autocast's."""
    options = {} if kind == "int8" else {"compute_dtype": torch.bfloat16}
    model = wrap(quantized_llama(kind, **options))
    fused = copy.deepcopy(model)
    fastlora.accelerate(fused)
    x = torch.randn(7, 32).to(dtype)
    with autocast(torch.bfloat16), counted_calls() as calls:
        y, expected = (each.base_model.model.model.layers[1].mlp.up_proj(x) for each in (fused, model))
    assert y.dtype == expected.dtype
    assert bool(calls) == (kind != "int8" or dtype == torch.bfloat16)


def test_the_usual_qlora_recipe():
    """prepare_model_for_kbit_training makes norms float32, so that hidden states are; compute dtype and autocast are bfloat16;
    activations are checkpointed."""
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


def test_a_float32_bias_is_cast_as_bitsandbytes_does():
    """prepare_model_for_kbit_training leaves it float32 on a layer that computes in bfloat16; here it stays that, too."""
    linear = quantize(torch.randn(40, 24), "nf4", bias=torch.randn(40), compute_dtype=torch.bfloat16)
    model = nn.Module()
    model.is_loaded_in_4bit, model.linear = True, linear
    model = wrap(model, target_modules=["linear"], bias="all")
    fused = copy.deepcopy(model)
    fastlora.accelerate(fused)
    x = torch.randn(7, 24, dtype=torch.bfloat16)
    layer, own = fused.base_model.model.linear, model.base_model.model.linear
    y, expected = layer(x), own(x)
    assert oracle.relative_error(y.detach(), expected.detach().double()) <= 2 * oracle.FLOOR[torch.bfloat16, torch.bfloat16]
    assert layer.base_layer.bias.dtype == torch.float32
    y.float().sum().backward()
    assert torch.equal(layer.base_layer.bias.grad, torch.full((40,), 7.0))
    assert not fastlora.peft.fallbacks(fused)


def test_layers_that_are_not_quantised_yet_are_left():
    model = quantized_llama("nf4")
    model.model.layers[0].self_attn.q_proj = Linear4bit(32, 32, bias=False)
    report = fastlora.accelerate(wrap(model))
    ((name, reason),) = report.left
    assert name.endswith("layers.0.self_attn.q_proj")
    assert reason == "its base layer is not quantised yet: move it to a device first"
    model = quantized_llama("int8")
    model.model.layers[1].mlp.up_proj = Linear8bitLt(32, 48, bias=False).to("cpu")
    ((_, reason),) = fastlora.accelerate(wrap(model)).left
    assert reason == "its base layer keeps its weight in 16 bits (has_fp16_weights=True)"


def test_register_leaves_quantised_layers_to_accelerate():
    import peft

    config = fastlora.peft.register(peft.LoraConfig(target_modules="all-linear", r=4))
    model = peft.get_peft_model(quantized_llama("nf4"), config)
    assert {type(layer).__module__ for layer in layers.find(model).values()} == {"peft.tuners.lora.bnb"}
    assert len(fastlora.accelerate(model).taken) == PROJECTIONS


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_compile(kind):
    torch._dynamo.reset()
    model = wrap(quantized_llama(kind))
    fastlora.accelerate(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    compiled = torch.compile(lambda x: layer(x).relu(), fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (9, 5):
        x = torch.randn(M, 32, requires_grad=True)
        results = [function(x) for function in (compiled, lambda x: layer(x).relu())]
        assert torch.equal(*results)
        gradients = [
            torch.autograd.grad(y.sum(), (x, layer.lora_A.default.weight, layer.lora_B.default.weight)) for y in results
        ]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
