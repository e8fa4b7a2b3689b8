"""A decoder layer and a whole model's training step: PEFT's adapters on every linear, and the same model accelerated.

Models are Llama, random weights, r = 16, dropout 0.1, adapters in PEFT's default dtype (float32), B random.  Before anything is
timed, outputs and gradients are compared without dropout: with e = ‖t − ref‖ / ‖ref‖ over all of them against the model in
float64, the accelerated model's e is at most twice that of PEFT's, or below the oracle's floor.
"""

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlora.peft
from fastlora import benchmark, oracle
from fastlora.benchmark.shapes import MODELS, Decoder

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


def layer_setting(device: torch.device, *, toy: bool = False) -> Setting:
    """The layer that is measured on `device`."""
    return _setting("Llama-3.1-8B", device, (4, 2048), toy)


def model_setting(device: torch.device, *, toy: bool = False) -> Setting:
    """The model whose training step is measured on `device`."""
    return _setting("Llama-3.2-1B", device, (4, 1024), toy)


def _setting(name: str, device: torch.device, tokens: tuple[int, int], toy: bool) -> Setting:
    if not toy and device.type == "cuda":
        return Setting(name, MODELS[name], *tokens, torch.bfloat16)
    size = "toy" if toy else "cpu"
    decoder = _SMALL[size]
    tokens = (2, 16) if toy else (2, 128)
    return Setting(f"Llama of width {decoder.hidden}", decoder, *tokens, torch.float32)


def build(setting: Setting, device: torch.device, *, layers: int | None = None, head: bool = True) -> nn.Module:
    """A PeftModel with random weights, B included; `layers` of the decoder's, with a head for language modelling or without."""
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


def accelerated(model: nn.Module) -> nn.Module:
    """A copy of a PeftModel, all of whose adapters run through fastlora.

    Raises:
        WrongResultError: some layers do not.
    """
    fast = copy.deepcopy(model)
    report = fastlora.accelerate(fast)
    if report.waiting or report.left:
        raise benchmark.WrongResultError(str(report))
    return fast


def verify(
    peft_model: nn.Module, fast_model: nn.Module, run: Callable[[nn.Module], Iterable[Tensor]], dtype: torch.dtype
) -> None:
    """Hold the accelerated model against float64, with PEFT's error as the measure; dropout is off.

    run: the outputs and gradients of a model in the dtype of its embeddings.

    Raises:
        WrongResultError: the error is over its bound, or some calls took PEFT's forward.
    """
    models = {"float64": copy.deepcopy(peft_model).double(), "PEFT": peft_model, "fastlora": fast_model}
    results = {}
    for name, model in models.items():
        model.eval()
        results[name] = torch.cat([tensor.detach().double().flatten() for tensor in run(model)])
        model.train()
    errors = {name: oracle.relative_error(results[name], results["float64"]) for name in ("PEFT", "fastlora")}
    if fallbacks := fastlora.peft.fallbacks(fast_model):
        raise benchmark.WrongResultError(f"what is called fastlora ran PEFT's forward: {fallbacks}")
    bound = max(oracle.EAGER_FACTOR * errors["PEFT"], oracle.FLOOR[dtype, dtype])
    if not errors["fastlora"] <= bound:
        raise benchmark.WrongResultError(f"the accelerated model is wrong, so it is not timed: {errors}, bound {bound:.2e}")


class Layer:
    """One decoder layer and the final norm, on random hidden states that require a gradient; frozen, PEFT, fastlora."""

    def __init__(self, setting: Setting, device: torch.device, copies: int | None = None) -> None:
        self.setting, self.device = setting, device
        self.peft = build(setting, device, layers=1, head=False)
        self.fast = accelerated(self.peft)
        verify(self.peft, self.fast, self._outputs, setting.dtype)
        shape = setting.batch, setting.length, setting.decoder.hidden
        count = copies or benchmark.copies_beyond_cache(2 * shape[0] * shape[1] * shape[2] * setting.dtype.itemsize, device)
        self.states = [[torch.randn(shape, device=device).to(setting.dtype) for _ in range(2)] for _ in range(count)]

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(1)
        shape = 1, min(self.setting.length, 64), self.setting.decoder.hidden
        dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else self.setting.dtype
        x, dy = (torch.randn(shape, generator=generator, device=self.device).to(self.setting.dtype).to(dtype) for _ in range(2))
        y = self.forward(model, x.requires_grad_())
        return [y, *torch.autograd.grad(y, [x, *self._adapters(model)], dy)]

    @staticmethod
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        """(batch, length, hidden) -> the same."""
        return model(inputs_embeds=x).last_hidden_state

    @staticmethod
    def _adapters(model: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def steps(self) -> dict[tuple[str, str], benchmark.Step]:
        """(provider, pass) -> step."""
        frozen: Any = copy.deepcopy(self.peft)
        frozen = frozen.unload()
        models = {"frozen layer": frozen.requires_grad_(False), "PEFT": self.peft, "fastlora": self.fast}
        return {(name, pass_): step for name, model in models.items() for pass_, step in self._passes(model).items()}

    def _passes(self, model: nn.Module) -> dict[str, benchmark.Step]:
        turn = itertools.cycle(self.states)

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            x, dy = next(turn)
            x = x.detach().requires_grad_()
            return x, self.forward(model, x), dy

        def backward(state: tuple[Tensor, Tensor, Tensor]) -> object:
            x, y, dy = state
            return torch.autograd.grad(y, [x, *self._adapters(model)], dy)

        steps = (forward, benchmark.Prepared(forward, backward), lambda: backward(forward()))
        return dict(zip(benchmark.PASSES, steps, strict=True))


class Training:
    """A step of a whole model: forward, loss, backward, AdamW on the adapters; PEFT, fastlora."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self.peft = build(setting, device)
        self.fast = accelerated(self.peft)
        verify(self.peft, self.fast, self._outputs, setting.dtype)

    def _tokens(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randint(self.setting.decoder.vocabulary, (batch, length), generator=generator, device=self.device)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        tokens = self._tokens(1, min(self.setting.length, 64))
        output: Any = model(input_ids=tokens, labels=tokens)
        return [output.logits, *torch.autograd.grad(output.loss, [p for p in model.parameters() if p.requires_grad])]

    def steps(self) -> dict[tuple[str, str], benchmark.Step]:
        """(provider, pass) -> step."""
        return {(name, TRAINING_STEP): self._step(model) for name, model in (("PEFT", self.peft), ("fastlora", self.fast))}

    def _step(self, model: nn.Module) -> benchmark.Step:
        tokens = self._tokens(self.setting.batch, self.setting.length)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step
