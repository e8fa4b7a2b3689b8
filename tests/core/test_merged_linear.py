"""enable_lora: adapters on slices of a fused projection, beside the published formula of loralib's MergedLinear."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted import gpt2, llama, logits, randomise
from layer_parity import factors, results
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora import FusedLoraEmbedding, FusedLoraLinear, from_pretrained, inject, load_adapter, oracle, save_adapter
from fastlora.dropout import draw_seed, keep_mask, keep_scale
from fastlora.injection.inject import injected
from fastlora.reference import EagerLoraLinear

QV = [True, False, True]
P = 0.3


def loralib(x: Tensor, module: FusedLoraLinear, p: float = 0.0) -> Tensor:
    """MergedLinear.forward as published: a grouped convolution of the pairs, its rows put at the enabled slices."""
    assert module.enable_lora is not None
    W = module.weight.t() if module.fan_in_fan_out else module.weight
    A, B = factors(module).values()
    if p:
        torch.manual_seed(7)
        x_dropped = x * keep_mask(draw_seed("cpu"), x.shape[0], x.shape[1], p) * keep_scale(p)
    else:
        x_dropped = x
    after_A = F.linear(x_dropped.to(A.dtype), A)
    after_B = F.conv1d(after_A.t().unsqueeze(0), B.unsqueeze(-1), groups=sum(module.enable_lora)).squeeze(0).t()
    rows = torch.tensor(module.enable_lora).repeat_interleave(W.shape[0] // len(module.enable_lora))
    update = torch.zeros(x.shape[0], W.shape[0], dtype=after_B.dtype).index_copy(1, rows.nonzero().squeeze(1), after_B)
    base = F.linear(x, W, module.bias)
    return (base + update * module.scaling).to(base.dtype)


class Published(nn.Module):
    """`loralib` on the tensors of a module, as `results` calls it."""

    def __init__(self, module: FusedLoraLinear, p: float) -> None:
        super().__init__()
        self.module, self.p = module, p

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module.bias

    def named_parameters(self, *args: Any, **keywords: Any) -> Any:
        return zip(("lora_A", "lora_B"), factors(self.module).values(), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return loralib(x, self.module, self.p)


def layer_of(enable_lora: list[bool], dtypes=oracle.DTYPES[0], kind: type[FusedLoraLinear] = FusedLoraLinear, **options: Any):
    torch.manual_seed(0)
    fan_in_fan_out = options.pop("fan_in_fan_out", False)
    base = (Conv1D(24, 10) if fan_in_fan_out else nn.Linear(10, 24)).to(dtypes[0])
    module = kind.from_linear(
        base, 4, 6, enable_lora=enable_lora, adapter_dtype=dtypes[1], fan_in_fan_out=fan_in_fan_out, **options
    )
    nn.init.normal_(module.lora_B)
    return module


def x_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(31, 10, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtypes", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("enable_lora", [QV, [True], [False, True], [True] * 4], ids=str)
@pytest.mark.parametrize("p", [0.0, P])
def test_parity_with_the_published_formula(dtypes, enable_lora, p):
    module = layer_of(enable_lora, dtypes, lora_dropout=p, fan_in_fan_out=len(enable_lora) == 3)
    x, published = x_of(dtypes[0]), Published(module, p)
    eager = results(published, x)
    torch.manual_seed(7)
    found = results(module, x, torch.randn(eager["y"].shape, generator=torch.Generator().manual_seed(9)).to(dtypes[0]))
    dy = torch.randn(eager["y"].shape, generator=torch.Generator().manual_seed(9)).to(dtypes[0]).double()
    truth = results(Published(module.double(), p), x.double(), dy)
    case = oracle.Case((1, 1, 1), dtype=dtypes[0], adapter_dtype=dtypes[1])
    rows = [oracle.judge(case, name, found[name], eager[name], truth[name]) for name in truth]
    assert all(row.passed for row in rows), "\n" + oracle.table(rows)


def test_loralibs_checkpoint_loads_and_merges():
    module, x = layer_of(QV, merge_weights=True), x_of(torch.float32)
    checkpoint = {"lora_A": torch.randn(8, 10), "lora_B": torch.randn(16, 4)}  # (r · n, in), (n · out / 3, r)
    module.load_state_dict(checkpoint, strict=False)
    expected = loralib(x, module).detach()
    unchanged = module.weight[8:16].clone()
    module.eval()
    assert oracle.relative_error(module(x).detach(), expected) <= oracle.FLOOR[oracle.DTYPES[0]]
    assert torch.equal(module.weight[8:16], unchanged)
    assert repr(module).startswith(
        "FusedLoraLinear(in_features=10, out_features=24, bias=True, enable_lora=[True, False, True], r=4"
    )


def test_dora_scales_whole_weights():
    with pytest.raises(ValueError, match=r"use_dora=True scales whole weights, and enable_lora=\[True, False, True\] adapts"):
        layer_of(QV, use_dora=True)


def test_layers_that_share_x_train_each_with_its_slices():
    """q and k are two linears of one x: the second step may compute them together, and must give what the first gave."""
    torch.manual_seed(0)
    model = randomise(
        inject(
            nn.ModuleDict({"q": nn.Linear(8, 6), "k": nn.Linear(8, 6)}),
            target_modules=["q", "k"],
            r=2,
            enable_lora={"q": [False, True]},
        )
    )
    x, found = torch.randn(5, 8), []
    for _ in range(3):
        model.zero_grad()
        y = torch.cat([model["q"](x), model["k"](x)])
        y.square().sum().backward()
        found.append((y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)))
    floor = oracle.FLOOR[oracle.DTYPES[0]]
    assert all(
        oracle.relative_error(one, other) <= floor for later in found[1:] for one, other in zip(later, found[0], strict=True)
    )


def test_the_eager_layer_computes_the_same():
    eager, module = layer_of(QV, kind=EagerLoraLinear), layer_of(QV)
    with torch.no_grad():
        for own, other in zip(eager.factors, module.factors, strict=True):
            own.copy_(other)
    x = x_of(torch.float32)
    assert oracle.relative_error(module(x).detach(), eager(x).detach()) <= oracle.FLOOR[oracle.DTYPES[0]]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_files_hold_the_equivalent_block_adapter(tmp_path: Path, use_rslora: bool):
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4, "lora_alpha": 6, "use_rslora": use_rslora}
    model = randomise(inject(gpt2(), **options, enable_lora={"c_attn": QV}))
    assert [tuple(p.shape) for p in model.transformer.h[0].attn.c_attn.factors] == [(8, 16), (32, 4)]
    expected = logits(model)
    save_adapter(model, tmp_path)
    again = inject(gpt2(), **options, enable_lora={"c_attn": QV})
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    floor = oracle.FLOOR[oracle.DTYPES[0]]
    for other in (from_pretrained(gpt2(), tmp_path), peft.PeftModel.from_pretrained(gpt2(), tmp_path)):
        assert oracle.relative_error(logits(other), expected) <= 2 * floor
    assert oracle.relative_error(logits(gpt2()), expected) > 100 * floor
    with pytest.raises(ValueError, match=r"r=8, but the layer '.*c_attn' has r=4"):
        load_adapter(inject(gpt2(), **options), tmp_path)
    with pytest.raises(ValueError, match=r"lora_B\.weight' has values outside of the blocks of .*True, False\]"):
        load_adapter(inject(gpt2(), **options, enable_lora={"c_attn": [True, True, False]}), tmp_path)


@pytest.mark.parametrize(
    ("enable_lora", "error", "message"),
    [
        (
            {"q_proj": [True, False, True]},
            ValueError,
            r"=\[True, False, True\] has 3 slices, .* divides out_features=16",
        ),
        ({"q_proj": []}, ValueError, r"enable_lora\['q_proj'\] must enable one slice at least, got \[\]"),
        ({"q_proj": [False]}, ValueError, r"enable_lora\['q_proj'\] must enable one slice at least, got \[False\]"),
        ({"q_proj": [1, 0]}, TypeError, r"enable_lora\['q_proj'\] must be a list of bools.* got \[1, 0\]"),
        ([True, False], TypeError, r"enable_lora must be a dict .*got \[True, False\]"),
        ({"qproj": [True, False]}, ValueError, "enable_lora: 'qproj' matches no targeted module; near names: q_proj"),
        (
            {"embed_tokens": [True, False]},
            TypeError,
            "matches 'model.embed_tokens', a Embedding, expected a linear",
        ),
    ],
)
def test_bad_input(enable_lora, error, message):
    model = llama()
    with pytest.raises(error, match=message):
        inject(model, target_modules=["q_proj", "embed_tokens"], enable_lora=enable_lora)
    assert not injected(model)
    assert not any(isinstance(module, FusedLoraLinear | FusedLoraEmbedding) for module in model.modules())
