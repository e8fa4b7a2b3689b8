"""The linears of well-known models, from their public configurations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """y (M, N) = x (M, K) Wᵀ, and the names under which the model has it."""

    names: tuple[str, ...]
    in_features: int
    out_features: int
    bias: bool = False


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder-only model with grouped-query attention and a gated MLP."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    qkv_bias: bool = False

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of a decoder layer."""
        hidden, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Linear(("q_proj",), hidden, q, self.qkv_bias),
            Linear(("k_proj", "v_proj"), hidden, kv, self.qkv_bias),
            Linear(("o_proj",), q, hidden),
            Linear(("gate_proj", "up_proj"), hidden, self.intermediate),
            Linear(("down_proj",), self.intermediate, hidden),
        )


MODELS = {
    "Llama-3.2-1B": Decoder(2048, 8192, 32, 8, 64, 16, 128256),
    "Llama-3.1-8B": Decoder(4096, 14336, 32, 8, 128, 32, 128256),
    "Llama-3.1-70B": Decoder(8192, 28672, 64, 8, 128, 80, 128256),
    "Qwen3-8B": Decoder(4096, 12288, 32, 8, 128, 36, 151936),
    "Qwen2.5-32B": Decoder(5120, 27648, 40, 8, 128, 64, 152064, qkv_bias=True),
}
