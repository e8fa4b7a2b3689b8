"""Experts of transformers alone, wrapped by PEFT, with inputs that route some tokens and leave one expert without any."""

from typing import Any

import torch
import transformers
from peft_models import wrap
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import fastlora

TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 24, 2, 5, 32, 24
STACKS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "mixtral": (MixtralExperts, {}),
    "gpt-oss": (GptOssExperts, {}),  # biases, weights stored (in, out), gate and up interleaved
    "nemotron": (NemotronHExperts, {}),  # no gate
    "muse": (MuseSparkExperts, {}),  # a norm after each expert
    "unaligned": (MixtralExperts, {"hidden_size": 30, "intermediate_size": 23, "experts_implementation": "eager"}),
}


class Mixture(nn.Module):
    """Experts whose input and routing weights are parameters. The last expert gets no token."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        cls, own = KINDS[kind]
        options = {"hidden_size": HIDDEN, "intermediate_size": INNER, "experts_implementation": "grouped_mm"} | own | options
        hidden, inner = options["hidden_size"], options["intermediate_size"]
        config = transformers.MixtralConfig(**options, num_local_experts=EXPERTS)
        config.update({"n_routed_experts": EXPERTS, "mlp_hidden_act": "relu2", "post_norm_eps": 1e-5, "swiglu_limit": 7.0})
        config.update({"moe_intermediate_size": inner, "moe_latent_size": None, "moe_hidden_size": hidden, "swiglu_alpha": 1.7})
        self.experts = cls(config)
        self.x = nn.Parameter(torch.empty(TOKENS, hidden))
        self.routing = nn.Parameter(torch.empty(TOKENS, TOP_K))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                size = parameter.shape[-2:].numel() ** 0.25 if "proj" in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / size)

    def forward(self, index: Tensor) -> Any:
        return CausalLMOutput(logits=self.experts(self.x, index, self.routing))


def mixture(kind: str = "mixtral", dtype: torch.dtype = torch.float32, stacks: list[str] = STACKS, **options: Any) -> Any:
    """PEFT's model of a Mixture, its input, routing weights and biases trainable."""
    model = Mixture(kind, **options).to(dtype)
    target = [name for name in stacks if hasattr(model.experts, name.split(".")[1])]
    model = wrap(model, target_modules=[], target_parameters=target, r=3, lora_alpha=5)
    for name, parameter in model.named_parameters():
        if name.endswith(("model.x", "routing", "bias")):
            parameter.requires_grad_()
    return model


def accelerated(**options: Any) -> Any:
    model = mixture(**options)
    fastlora.accelerate(model)
    return model


def index_of(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"index": torch.rand(TOKENS, EXPERTS - 1, generator=generator).argsort(-1)[:, :TOP_K]}


def outermost(model: Any) -> Any:
    """The outermost of the nested wrappers of the experts."""
    return model.base_model.model.experts
