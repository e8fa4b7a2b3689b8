"""A decoder layer and a whole model's training step: PEFT's adapters on every linear, and the same model accelerated.

Models are Llama with random weights, r = 16, dropout 0.1, adapters in PEFT's default dtype (float32), B random.  Outputs and
gradients are compared, without dropout, before anything is timed: with e = ‖t − ref‖ / ‖ref‖ over all of them and ref from the
model in float64, the accelerated model's e must be at most twice that of PEFT's, or below the oracle's floor.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlora.peft
from benches.shapes import MODELS, Decoder
from fastlora import oracle
from fastlora.benchmark import WrongResultError, trial
from fastlora.benchmark.clock import Step, copies_beyond_cache

Steps = dict[tuple[str, str], Step]  # by (provider, pass)

R, DROPOUT_P = 16, 0.1
LAYER, TRAINING_STEP = "decoder layer", "training step"


@dataclass(frozen=True)
class Setting:
    """Which model, in which dtype, on how many tokens."""

    name: str
    decoder: Decoder
    batch: int
    length: int
    dtype: torch.dtype

    def facts(self, kind: str) -> dict[str, Any]:
        """The columns of a row that say what was measured."""
        size = {"M": self.batch * self.length, "r": R, "p": DROPOUT_P}
        dtypes = {"dtype": str(self.dtype).removeprefix("torch."), "adapter_dtype": "float32"}
        return {"kind": kind, "id": kind, "used_by": self.name, **size, **dtypes}


_SMALL = {"toy": Decoder(64, 96, 4, 2, 16, 2, 128), "cpu": Decoder(512, 1408, 8, 4, 64, 2, 1024)}
_ON_GPU = {LAYER: ("Llama-3.1-8B", 4, 2048), TRAINING_STEP: ("Llama-3.2-1B", 4, 1024)}  # model, batch, length


def setting(kind: str, device: torch.device, *, toy: bool = False) -> Setting:
    """What is measured on `device`; kind: LAYER or TRAINING_STEP."""
    if not toy and device.type == "cuda":
        name, batch, length = _ON_GPU[kind]
        return Setting(name, MODELS[name], batch, length, torch.bfloat16)
    small = _SMALL["toy" if toy else "cpu"]
    return Setting(f"Llama of width {small.hidden}", small, 2, 16 if toy else 128, torch.float32)


def build(setting: Setting, device: torch.device, *, layers: int | None = None, head: bool = True) -> nn.Module:
    """A PeftModel with random weights, B included, and `layers` decoder layers; head: for language modelling."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    decoder = setting.decoder
    config = LlamaConfig(
        vocab_size=decoder.vocabulary if head else 8,
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=layers or decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config) if head else LlamaModel(config)
        model.to(setting.dtype)
    targets = [name for linear in decoder.linears for name in linear.names]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=DROPOUT_P, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted.train()


def accelerated(peft_model: nn.Module, run: Callable[[nn.Module], Iterable[Tensor]], dtype: torch.dtype) -> nn.Module:
    """A copy of the PeftModel in which fastlora runs all adapters, compared with float64 relative to PEFT's error.

    run: computes outputs and gradients of a model, in the dtype of its embeddings; dropout is off.

    Raises:
        WrongResultError: fastlora does not run all adapters, some calls used PEFT's forward, or the error is over its bound.
    """
    fast = copy.deepcopy(peft_model)
    report = fastlora.accelerate(fast)
    if report.waiting or report.left:
        raise WrongResultError(str(report))
    results = {}
    for name, model in {"float64": copy.deepcopy(peft_model).double(), "PEFT": peft_model, "fastlora": fast}.items():
        model.eval()
        results[name] = torch.cat([tensor.detach().double().flatten() for tensor in run(model)])
        model.train()
    if fallbacks := fastlora.peft.fallbacks(fast).keys() - {fastlora.peft.SMALL}:
        raise WrongResultError(f"the accelerated model ran PEFT's forward: {fallbacks}")
    errors = {name: oracle.relative_error(results[name], results["float64"]) for name in ("PEFT", "fastlora")}
    bound = max(oracle.EAGER_FACTOR * errors["PEFT"], oracle.FLOOR[dtype, dtype])
    if not errors["fastlora"] <= bound:
        raise WrongResultError(f"the accelerated model is wrong, so it is not timed: {errors}, bound {bound:.2e}")
    return fast


def layer_steps(setting: Setting, device: torch.device, copies: int | None = None) -> Steps:
    """One decoder layer and the final norm, on random hidden states that require a gradient; frozen, PEFT, fastlora."""
    hidden = setting.decoder.hidden

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(setting.dtype)

    def halves(model: nn.Module, turn: Iterator[Any]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        def forward() -> tuple[Tensor, Tensor, Tensor]:
            x, dy = next(turn)
            x = x.detach().requires_grad_()
            return x, model(inputs_embeds=x).last_hidden_state, dy

        def backward(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            x, y, dy = state
            return torch.autograd.grad(y, [x, *_adapters(model)], dy)

        return forward, backward

    def outputs(model: nn.Module) -> list[Tensor]:
        forward, backward = halves(model, iter([short.to(next(model.parameters()).dtype)]))
        state = forward()
        return [state[1], *backward(state)]

    generator = torch.Generator(device).manual_seed(1)
    short = draw(2, 1, min(setting.length, 64), hidden)
    peft_model = build(setting, device, layers=1, head=False)
    frozen: Any = copy.deepcopy(peft_model, {id(p): p for p in peft_model.parameters()})  # it shares the weights
    fast = accelerated(peft_model, outputs, setting.dtype)
    models = {"frozen layer": frozen.unload(), "PEFT": peft_model, "fastlora": fast}
    nbytes = 2 * setting.batch * setting.length * hidden * setting.dtype.itemsize
    turn = itertools.cycle(draw(copies or copies_beyond_cache(nbytes, device), 2, setting.batch, setting.length, hidden))
    steps = {name: trial.passes(*halves(model, turn)) for name, model in models.items()}
    return {(name, pass_): steps[name][pass_] for pass_ in trial.PASSES for name in models}


def training_steps(setting: Setting, device: torch.device, copies: int | None = None) -> Steps:
    """A step of a whole model: forward, loss, backward, AdamW on the adapters; PEFT, fastlora."""
    generator = torch.Generator(device).manual_seed(2)
    size = setting.batch, setting.length
    tokens = torch.randint(setting.decoder.vocabulary, size, generator=generator, device=device)

    def outputs(model: nn.Module) -> list[Tensor]:
        short = tokens[:1, :64]
        output: Any = model(input_ids=short, labels=short)
        return [output.logits, *torch.autograd.grad(output.loss, _adapters(model))]

    def step_of(model: nn.Module) -> Step:
        optimizer = torch.optim.AdamW(_adapters(model), lr=1e-4)

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    peft_model = build(setting, device)
    models = {"PEFT": peft_model, "fastlora": accelerated(peft_model, outputs, setting.dtype)}
    return {(name, TRAINING_STEP): step_of(model) for name, model in models.items()}


STEPS = {LAYER: layer_steps, TRAINING_STEP: training_steps}


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
