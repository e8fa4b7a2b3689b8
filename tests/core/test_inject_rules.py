"""inject against PEFT: the same targets, ranks, scalings and trainable parameters, whatever is asked for."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from adapted import CASES, IDS, llama, our_name, randomise, roberta, tied_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastlora
from fastlora import FusedLoraLinear, inject, oracle
from fastlora.injection.matching import match_modules_to_save, match_targets
from fastlora.injection.options import LoraOptions

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PARTS = ["q", "qq", "k", "0", "1", "layers", "mlp", "proj"]
paths = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join)
names = st.lists(paths, min_size=1, max_size=3)


SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2ForCausalLM": ("Qwen2Config", SMALL | {"vocab_size": 40, "num_key_value_heads": 1}),
    "Qwen3ForCausalLM": ("Qwen3Config", SMALL | {"vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8}),
    "MistralForCausalLM": ("MistralConfig", SMALL | {"vocab_size": 40, "num_key_value_heads": 1}),
    "GemmaForCausalLM": ("GemmaConfig", SMALL | {"vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "ViTForImageClassification": ("ViTConfig", SMALL | {"image_size": 8, "patch_size": 4}),
}


def of_architecture(name: str) -> nn.Module:
    config, sizes = ARCHITECTURES[name]
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


ALL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = CASES | {
    name: (partial(of_architecture, name), {"target_modules": "all-linear", "bias": "all"}) for name in ARCHITECTURES
}


@pytest.mark.parametrize("case", ALL)
@pytest.mark.filterwarnings("ignore")  # PEFT's warnings are not the subject
def test_trains_what_peft_trains(case: str) -> None:
    build, options = ALL[case]
    expected = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=6, **options))
    model = inject(build(), r=4, lora_alpha=6, **options)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        our_name(n) for n, p in expected.named_parameters() if p.requires_grad
    }
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FusedLoraLinear)}
    by_peft = {n: m for n, m in expected.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert layers.keys() == by_peft.keys()
    for name, layer in layers.items():
        other = by_peft[name]
        assert (layer.r, layer.lora_alpha, layer.scaling, layer.fan_in_fan_out) == (
            other.r["default"],
            other.lora_alpha["default"],
            other.scaling["default"],
            other.fan_in_fan_out,
        )
    trainable, total = fastlora.get_nb_trainable_parameters(model)
    trainable_there, total_there = expected.get_nb_trainable_parameters()
    assert trainable == trainable_there
    # PEFT holds the original of a module to save beside its copy.
    originals = {p for m in expected.modules() if hasattr(m, "original_module") for p in m.original_module.parameters()}
    outside = {p for n, p in expected.named_parameters(remove_duplicate=False) if ".original_module." not in n}
    assert total == total_there - sum(p.numel() for p in originals - outside)


def loss_curve(model: nn.Module) -> Tensor:
    """The losses of eight steps without dropout, from random values of all that is trained."""
    randomise(model).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("case", ["all of both", "Conv1D", "both to save", "tied head"])
@pytest.mark.filterwarnings("ignore")
def test_trains_as_peft_trains(case: str) -> None:
    """With PEFT in float64 for the truth and PEFT in float32 for eager."""
    build, options = CASES[case]

    config = peft.LoraConfig(r=4, lora_alpha=6, **options)
    truth, eager = (
        loss_curve(peft.get_peft_model(build().to(dtype), config, autocast_adapter_dtype=False))
        for dtype in (torch.float64, torch.float32)
    )
    fused = loss_curve(inject(build(), r=4, lora_alpha=6, **options))
    bound = max(oracle.FLOOR[torch.float32, torch.float32], oracle.EAGER_FACTOR * oracle.relative_error(eager, truth))
    assert oracle.relative_error(fused, truth) <= bound
    assert truth[-1] < 0.999 * truth[0]  # it learns


@settings(max_examples=300)
@given(
    there=st.lists(paths, min_size=1, max_size=4),
    targets=names,
    exclude=st.one_of(st.none(), names, st.sampled_from([r".*\.q", "q.*", ".*0.*"])),
    saved=st.one_of(st.just([]), names),
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 1))),
    pattern=st.one_of(st.none(), st.sampled_from(["layers", "mlp", ["proj", "layers"]])),
)
@example(
    there=["mlp.layers.1.mlp.0.q"], targets=["q"], exclude=None, saved=[], layers=1, pattern=None
)  # the first number counts
@example(there=["mlp.layers.1.layers.0.q"], targets=["q"], exclude=None, saved=[], layers=1, pattern="layers")
def test_matches_as_peft(there: Any, targets: Any, exclude: Any, saved: Any, layers: Any, pattern: Any) -> None:
    pattern = pattern if layers is not None else None
    options = {"exclude_modules": exclude, "modules_to_save": saved, "layers_to_transform": layers, "layers_pattern": pattern}
    config = peft.LoraConfig(target_modules=targets, **options)
    root = tree(there)
    exists = peft.tuners.tuners_utils.check_target_module_exists
    expected = {path: module for path, module in root.named_modules() if path and exists(config, path)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if expected and all(isinstance(module, nn.Linear) for module in expected.values()):
            assert match_targets(root, targets, **options) == expected
        else:
            with pytest.raises((ValueError, TypeError)):
                match_targets(root, targets, **options)


def tree(names: list[str]) -> nn.Module:
    """A model with a linear at each of `names`, unless another one is there or above."""
    root = nn.Module()
    for name in names:
        node = root
        *parents, leaf = name.split(".")
        for part in parents:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        if not isinstance(node, nn.Linear) and not hasattr(node, leaf):
            node.add_module(leaf, nn.Linear(2, 2))
    return root


@given(name=paths, keys=st.lists(st.sampled_from([*PARTS, "^q", r"layers\..*", ".*k", "q|k", "0.q"]), max_size=4, unique=True))
def test_patterns_as_peft(name: str, keys: list[str]) -> None:
    patterns = {key: index for index, key in enumerate(keys)}
    alpha = LoraOptions(lora_alpha=-1, alpha_pattern=patterns).of_layer(name)["lora_alpha"]
    assert alpha == patterns.get(peft.utils.other.get_pattern_key(keys, name), -1)


def test_modules_to_save_by_the_end_of_their_names() -> None:
    found = match_modules_to_save(roberta(), ["fier.dense", "0.output.LayerNorm"])
    assert list(found) == ["roberta.encoder.layer.0.output.LayerNorm", "classifier.dense"]


@pytest.mark.filterwarnings("ignore")
def test_prints_as_peft(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"target_modules": ["q_proj", "lm_head"], "r": 4}
    peft.get_peft_model(tied_llama(), peft.LoraConfig(**options)).print_trainable_parameters()
    fastlora.print_trainable_parameters(inject(tied_llama(), **options))
    by_peft, ours = capsys.readouterr().out.splitlines()
    assert ours == by_peft
    fastlora.print_trainable_parameters(nn.Identity())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


def test_four_bit_weights_count_as_in_peft() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    wrapped = peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(target_modules=["0"], r=1))
    assert linear.weight.dtype == torch.uint8
    assert fastlora.get_nb_trainable_parameters(wrapped) == wrapped.get_nb_trainable_parameters() == (96, 2048 + 96)


def test_models_with_layers_of_peft_are_refused() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"holds layers of PEFT's, such as '.*q_proj': fastlora\.accelerate"):
        inject(model, target_modules="all-linear")
    assert model.get_nb_trainable_parameters()[0] > 0
