"""LoRA on the experts of a mixture: PEFT's results and gradients without a second stack of weights."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from mixtures import EXPERTS, KINDS, STACKS, TOKENS, TOP_K, Mixture, accelerated, index_of, mixture, outermost
from peft_models import CAUSAL, Judged, inputs_of, logits_of, randomise, wrap
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import fastlora
from fastlora import oracle
from fastlora.peft import calls, experts, fallbacks, layers

MIXTURE = {**CAUSAL, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {**MIXTURE, "num_local_experts": 4}),
    "qwen3": ("Qwen3MoeForCausalLM", {**MIXTURE, "num_experts": 4, "moe_intermediate_size": 24}),
    "gpt-oss": ("GptOssForCausalLM", {**MIXTURE, "num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
}


def exact(model: nn.Module) -> nn.Module:
    """A copy that runs the experts' own forward: torch has no grouped product in float64."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return model


def judged(model: nn.Module, draws: list[dict[str, Tensor]], autocast_dtype: torch.dtype | None = None) -> Judged:
    judge = Judged(model, autocast_dtype, exact)
    for seed, inputs in enumerate(draws):
        judge.add(inputs, seed)
    return judge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_every_gradient(kind: str, dtype: torch.dtype) -> None:
    judge = judged(mixture(kind, dtype), [index_of(seed) for seed in range(6)])
    assert not judge.failures(oracle.FLOOR[dtype, dtype])
    assert {"logits", "base_model.model.x", "base_model.model.routing"} < judge.sums.keys()
    assert len(judge.sums) == (9 if kind == "gpt-oss" else 7)
    assert fallbacks(judge.fused) == {}
    unrouted = [parameter.grad for name, parameter in judge.fused.named_parameters() if "lora_A" in name]
    assert all(not grad[-3:].any() and grad[:-3].any() for grad in unrouted)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("stack", STACKS[::2])
def test_one_stack_and_other_implementations(stack: str, implementation: str) -> None:
    judge = judged(mixture(stacks=[stack], experts_implementation=implementation), [index_of()])
    assert not judge.failures(oracle.FLOOR[torch.float32, torch.float32])
    assert len(judge.sums) == 5
    assert fallbacks(judge.fused) == {}


def test_under_autocast() -> None:
    judge = judged(mixture(), [index_of(seed) for seed in range(3)], torch.bfloat16)
    assert not judge.failures(oracle.FLOOR[torch.bfloat16, torch.bfloat16])
    assert fallbacks(judge.fused) == {}


@pytest.mark.parametrize("targets", ["all-linear", []])
@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str, targets: Any) -> None:
    name, options = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**options))
    judge = judged(wrap(model, target_modules=targets, target_parameters=STACKS[::2]), [inputs_of(seed=s) for s in range(3)])
    assert not judge.failures(oracle.FLOOR[torch.float32, torch.float32])
    assert fallbacks(judge.fused) == {}
    report = fastlora.peft.status(judge.fused)
    assert sum(".mlp.experts" in layer for layer in report.taken) == 4
    assert all("TopKRouter.weight" in reason for _, reason in report.left)
    assert len(judge.sums) - 1 == 2 * len(report.taken + report.left)


PLANTED: dict[str, Callable[[Any], Any]] = {
    "no adapter": lambda term: term._replace(scaling=0.0),
    "no scaling": lambda term: term._replace(scaling=1.0),
    "experts shifted": lambda term: term._replace(lora_A=term.lora_A.roll(3, 0)),
    "columns by expert first": lambda term: term._replace(
        lora_B=term.lora_B.view(-1, EXPERTS, 3).transpose(1, 2).reshape(term.lora_B.shape)
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_errors_are_seen(monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    right = experts.adapter
    monkeypatch.setattr(experts, "adapter", lambda layer: PLANTED[planted](right(layer)))
    judge = judged(mixture(), [index_of()])
    assert len(judge.failures(0.02)) == len(judge.sums)


class Allocations(TorchDispatchMode):
    """The most elements of a tensor that an operation made, other than a view of one of `known`."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.most = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, tensor.numel())
        return result


def most_allocated(model: nn.Module) -> int:
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with Allocations(known) as seen:
        logits_of(model, index_of()).sum().backward()
    return seen.most


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "unaligned"])
def test_nothing_of_a_stacks_size_is_allocated(kind: str) -> None:
    model = mixture(kind, hidden_size=96, intermediate_size=80)
    rows = TOKENS * TOP_K * 2 * 80
    stack = EXPERTS * 96 * 80
    assert most_allocated(copy.deepcopy(model)) >= 2 * stack
    fastlora.accelerate(model)
    assert most_allocated(model) == rows < stack


def test_adapters_as_older_versions_of_peft_lay_them_out() -> None:
    """PEFT before 0.19 takes the rows of weights (out, in) for inputs."""
    model = mixture()
    for layer in (outermost(model), outermost(model).base_layer):
        _, out, inner = layer.get_param().shape
        layer._did_swap_in_out_features = False
        layer.lora_A["default"] = nn.Linear(out, 4 * EXPERTS, bias=False)
        layer.lora_B["default"] = nn.Linear(4 * EXPERTS, inner, bias=False)
    randomise(model)
    judge = judged(model, [index_of()])
    assert not judge.failures(oracle.FLOOR[torch.float32, torch.float32])
    assert fallbacks(judge.fused) == {}


def set_implementation(name: str) -> Callable[[Any], Any]:
    return lambda layer: setattr(layer.get_base_layer().config, "_experts_implementation", name)


HOOKED = "its base layer has hooks, or a forward of its own"
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "disabled": (lambda layer: layer.enable_adapters(False), calls.DISABLED),
    "merged": (lambda layer: layer.merge(), calls.MERGED),
    "hook on a wrapper below": (lambda layer: layer.base_layer.register_forward_hook(lambda *args: None), HOOKED),
    "hook on the experts": (lambda layer: layer.get_base_layer().register_forward_hook(lambda *args: None), HOOKED),
    "trainable base": (lambda layer: layer.get_base_layer().down_proj.requires_grad_(), "its base weight is trainable"),
    "another implementation": (set_implementation("mine"), "its experts run through 'mine'"),
    "expert parallel": (
        lambda layer: setattr(layer.get_base_layer(), "_is_expert_parallel", True),
        "its experts are spread over devices",
    ),
    "not accelerated": (
        lambda layer: layers.restore(layer.base_layer),
        "a layer below it is not accelerated",
    ),
}


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_pefts(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "mine", grouped_mm_experts_forward)
    alter, reason = CHANGES[change]
    model = mixture()
    fused = copy.deepcopy(model)
    fastlora.accelerate(fused)
    for each in (fused, model):
        if change != "not accelerated" or each is fused:
            alter(outermost(each))
    assert dict(fastlora.peft.status(fused).waiting)["base_model.model.experts"] == reason
    result, expected = (logits_of(each, index_of()) for each in (fused, model))
    assert fallbacks(fused)[reason]["base_model.model.experts"] == 1
    if change in ("disabled", "merged"):  # the wrapper below has a term of its own, and adds it
        assert fallbacks(fused).keys() == {reason}
        assert oracle.relative_error(result, expected) <= oracle.FLOOR[torch.float32, torch.float32]
    else:
        assert torch.equal(result, expected)


def test_adapters_added_merged_and_removed_afterwards() -> None:
    eager, fused = mixture(), accelerated()
    assert sorted(fastlora.peft.status(fused).taken) == ["base_model.model.experts", "base_model.model.experts.base_layer"]
    for model in (eager, fused):
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=[], target_parameters=STACKS[::2]))
        model.set_adapter("second")
        randomise(model)
        assert outermost(model).get_base_layer() is outermost(model).base_layer.base_layer
        outermost(model).base_layer.merge()
    floor = 2 * oracle.FLOOR[torch.float32, torch.float32]
    assert oracle.relative_error(logits_of(fused, index_of()), logits_of(eager, index_of())) <= floor
    assert fallbacks(fused) == {}
    for model in (eager, fused):
        outermost(model).base_layer.unmerge()
        model.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits_of(fused.eval(), index_of()), logits_of(eager.eval(), index_of()))
    assert fallbacks(fused).keys() == {"several adapters are active"}
    assert fastlora.decelerate(fused) == 2
    assert type(outermost(fused)) is type(outermost(eager)) is type(outermost(eager).base_layer)
    assert type(fused.merge_and_unload().experts) is MixtralExperts


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
def test_a_layer_below_one_of_pefts_is_pefts() -> None:
    model, fused = mixture(), accelerated()
    layers.restore(outermost(fused))
    assert torch.equal(logits_of(fused, index_of()), logits_of(model, index_of()))
    assert fallbacks(fused).keys() == {"its base weight is parametrised"}


def test_torch_compile_in_bfloat16() -> None:
    model = accelerated(dtype=torch.bfloat16)
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for forward in (model, torch.compile(model, backend=counter, fullgraph=True)):
        model.zero_grad()
        logits = logits_of(forward, index_of())
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    floor = 2 * oracle.FLOOR[torch.bfloat16, torch.bfloat16]
    assert all(oracle.relative_error(one, other) <= floor for one, other in zip(*results, strict=True))
    assert counter.frame_count == 1
    assert fallbacks(model) == {}


def test_torch_compile_in_float32_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerated()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # PEFT's forward takes half a minute to compile
    reason = "torch.compile traces grouped products in bfloat16 alone, with rows of a multiple of 16 bytes"
    assert {given for _, given in fastlora.peft.status(model).waiting} == {reason}


@pytest.mark.filterwarnings("ignore:fastlora")
@pytest.mark.parametrize("parameter", ["routing", "experts.gate_up_proj_bias"])
def test_other_parameters_are_left(parameter: str) -> None:
    holder = nn.ModuleDict({"inner": Mixture("gpt-oss")})
    model = wrap(holder, target_modules=[], target_parameters=[f"inner.{parameter}"])
    ((_, reason),) = fastlora.accelerate(model).left
    assert reason.endswith(f".{parameter.split('.')[-1]}, not a weight stack of transformers' experts")


def test_other_arguments_are_for_peft() -> None:
    layer = outermost(accelerated())
    x, index, routing = torch.zeros(TOKENS, 32), index_of()["index"], torch.zeros(TOKENS, TOP_K)
    assert not isinstance(layer._decide(x, (index, routing), {}), str)
    assert layer._decide(x, (index,), {"top_k_weights": routing}) == (
        "the experts are called with other arguments than x, indices and routing weights"
    )
    assert layer._decide(x.to("meta"), (index, routing), {}) == "x is on meta, the base weight on cpu"
