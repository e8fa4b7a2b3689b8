"""A decoder layer and a whole model's training step: PEFT's adapters on every linear, and the same computed in other ways.

Models are Llama with random weights, r = 16, dropout 0.1, adapters in PEFT's default dtype (float32), B random.  Outputs and
gradients are compared, without dropout, before anything is timed: with e = ‖t − ref‖ / ‖ref‖ over all of them and ref from the
model in float64, the e of another model must be at most twice that of PEFT's, or below the oracle's floor.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastlora.peft
from benches import chained
from benches.setting import (
    CHAINED,
    COMPILED_PEFT,
    DROPOUT_P,
    FASTLORA,
    FROZEN,
    LAYER,
    PEFT,
    SINGLE,
    TRAINING_STEP,
    Failed,
    R,
    Ready,
    Setting,
    adapters_of,
    contenders,
)
from fastlora import oracle
from fastlora.benchmark import WrongResultError, trial
from fastlora.benchmark.clock import Step, copies_beyond_cache

Run = Callable[[nn.Module], Iterable[Tensor]]  # outputs and gradients of a model, in the dtype of its embeddings

#: What `fastlora.accelerate` is told.
OPTIONS = {SINGLE: {"groups": False, "mlp": False}, FASTLORA: {"groups": True, "mlp": True}}


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


def variant(name: str, peft_model: nn.Module, compiler: str | None) -> nn.Module:
    """A copy of the PeftModel, on the same parameters, that computes as the contender `name` does.

    Raises:
        WrongResultError: fastlora does not run all adapters.
    """
    model: Any = copy.deepcopy(peft_model, {id(p): p for p in peft_model.parameters()})
    if name == FROZEN:
        return model.unload()
    layers = [module for module in model.modules() if hasattr(module, "self_attn")]
    if name == CHAINED:
        set_dropout(model, 0.0)
        for layer in layers:
            _chain(layer)
    elif name == COMPILED_PEFT:
        for layer in layers:  # the code of one layer serves all
            layer.compile(backend=compiler, dynamic=False)
    elif name in OPTIONS:
        report = fastlora.accelerate(model, **OPTIONS[name])
        if report.waiting or report.left or report.mlps_left:
            raise WrongResultError(str(report))
    return model


def set_dropout(model: nn.Module, p: float) -> None:
    """The rate of every dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def _chain(layer: Any) -> None:
    """Compute a decoder layer's linears by `benches.chained`: q computes k and v too, which the next two calls fetch."""
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    waiting: list[Tensor] = []

    def chain(function: Callable[..., Any], x: Tensor, *linears: Any) -> Any:
        weights = [
            (one.base_layer.weight, *(side["default"].weight.to(x.dtype) for side in (one.lora_A, one.lora_B)), None)
            for one in linears
        ]
        y = function(x.flatten(0, -2), weights, q.scaling["default"])
        return y.view(*x.shape[:-1], -1) if isinstance(y, Tensor) else [one.view(*x.shape[:-1], -1) for one in y]

    def first(x: Tensor) -> Tensor:
        y, *waiting[:] = chain(chained.projections, x, q, k, v)
        return y

    q.forward = first
    k.forward = v.forward = lambda x: waiting.pop(0)
    o.forward = lambda x: chain(chained.projections, x, o)[0]
    mlp.forward = lambda x: chain(chained.mlp, x, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


class Check:
    """Compares models with the PeftModel in float64, relative to the PeftModel's own error; dropout is off."""

    def __init__(self, peft_model: nn.Module, run: Run, dtype: torch.dtype) -> None:
        self.run, self.dtype = run, dtype
        self.ref = self._results(copy.deepcopy(peft_model).double())
        self.error = oracle.relative_error(self._results(peft_model), self.ref)

    def __call__(self, name: str, model: nn.Module) -> None:
        """Raise WrongResultError if the error is over its bound, or if fastlora computes less than it was asked to."""
        error = oracle.relative_error(self._results(model), self.ref)
        if name in OPTIONS:
            fallbacks, report = fastlora.peft.fallbacks(model).keys(), fastlora.peft.status(model)
            if unexpected := fallbacks - {fastlora.peft.SMALL}:
                raise WrongResultError(f"the accelerated model ran PEFT's forward: {unexpected}")
            if not fallbacks and (report.single or bool(report.groups) != OPTIONS[name]["groups"]):
                raise WrongResultError(f"q, k and v are not computed as they should be:\n{report}")
        bound = max(oracle.EAGER_FACTOR * self.error, oracle.FLOOR[self.dtype, self.dtype])
        if not error <= bound:
            raise WrongResultError(
                f"{name} is wrong, so it is not timed: {error:.2e}, PEFT {self.error:.2e}, bound {bound:.2e}"
            )

    def _results(self, model: nn.Module) -> Tensor:
        rates = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        set_dropout(model, 0.0)
        self.run(model)  # layers that share x find each other here, and compute as a group below
        found = torch.cat([tensor.detach().double().flatten() for tensor in self.run(model)])
        for module, p in rates.items():
            module.p = p
        return found


def variants(peft_model: nn.Module, run: Run, setting: Setting, failed: Failed) -> dict[str, nn.Module]:
    """The model of each contender that is right."""
    check, found = Check(peft_model, run, setting.dtype), {}
    for name in contenders(setting.compiler):
        try:
            model = peft_model if name == PEFT else variant(name, peft_model, setting.compiler)
            if name not in (FROZEN, PEFT):
                check(name, model)
            found[name] = model
        except Exception as error:  # torch.compile, Triton and PEFT have no base of their errors in common
            failed(name, error)
    return found


def layer_steps(setting: Setting, device: torch.device, failed: Failed, copies: int | None = None) -> Ready:
    """One decoder layer and the final norm, on random hidden states that require a gradient."""
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
            return torch.autograd.grad(y, [x, *adapters_of(model)], dy)

        return forward, backward

    def outputs(model: nn.Module) -> list[Tensor]:
        forward, backward = halves(model, iter([short.to(next(model.parameters()).dtype)]))
        state = forward()
        return [state[1], *backward(state)]

    generator = torch.Generator(device).manual_seed(1)
    short = draw(2, *setting.checked, hidden)
    peft_model = build(setting, device, layers=1, head=False)
    models = variants(peft_model, outputs, setting, failed)
    nbytes = 2 * setting.rows * hidden * setting.dtype.itemsize
    shape = setting.batch, setting.length, hidden
    # Each x in a storage of its own, which counts as saved.
    turn = itertools.cycle([(draw(*shape), draw(*shape)) for _ in range(copies or copies_beyond_cache(nbytes, device))])
    steps = {name: trial.passes(*halves(model, turn)) for name, model in models.items()}
    return Ready(
        {(name, pass_): steps[name][pass_] for pass_ in trial.PASSES for name in models}, list(peft_model.parameters())
    )


def training_steps(setting: Setting, device: torch.device, failed: Failed, copies: int | None = None) -> Ready:
    """A step of a whole model: forward, loss, backward, AdamW on the adapters.

    The frozen model has no adapters: its backward ends at the embeddings, and nothing is updated.
    """
    generator = torch.Generator(device).manual_seed(2)
    size = setting.batch, setting.length
    tokens = torch.randint(setting.decoder.vocabulary, size, generator=generator, device=device)
    batch, length = setting.checked

    def outputs(model: nn.Module) -> list[Tensor]:
        short = tokens[:batch, :length]
        output: Any = model(input_ids=short, labels=short)
        return [output.logits, *torch.autograd.grad(output.loss, adapters_of(model))]

    def step_of(name: str, model: Any) -> Step:
        def frozen_step() -> None:
            x = model.get_input_embeddings()(tokens).detach().requires_grad_()
            model(inputs_embeds=x, labels=tokens).loss.backward()

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        if name == FROZEN:
            return frozen_step
        optimizer = torch.optim.AdamW(adapters_of(model), lr=1e-4)
        return step

    peft_model = build(setting, device)
    models = variants(peft_model, outputs, setting, failed)
    steps = {(name, TRAINING_STEP): step_of(name, model) for name, model in models.items()}
    return Ready(steps, list(peft_model.parameters()))


STEPS = {LAYER: layer_steps, TRAINING_STEP: training_steps}
