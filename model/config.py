"""The shape of a model: one frozen record that a family fills from its own config and the layers read. No jax here."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. Defaults are Llama's; the letters are those of the einsum equations.

    `rope_scaling` is the `rope_scaling` / `rope_parameters` dict of a Hugging Face config, as sorted pairs so that
    the record hashes. `windows` holds one sliding window a layer (0: full attention); empty means full everywhere.
    """

    vocab_size: int  # V
    layers: int  # L
    embed: int  # D
    heads: int  # N
    kv_heads: int  # K; N / K query heads share one key head (grouped-query attention)
    head_dim: int  # H
    mlp: int  # F
    family: str = "llama"  # a file in model/families: key names on import and export
    norm: str = "rmsnorm"  # | "layernorm"
    norm_eps: float = 1e-5
    act: str = "silu"  # | "gelu" | "gelu_tanh"
    gated: bool = True  # SwiGLU-like: act(x @ gate) * (x @ up)
    position: str = "rope"  # | "learned"
    max_len: int = 8192
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    tied: bool = False  # the unembedding is the embedding's transpose
    bias: str = "none"  # | "qkv" (Qwen2) | "all" (GPT-2)
    qk_norm: bool = False  # RMSNorm on each query and key head (Qwen3)
    windows: tuple[int, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Letter of an einsum equation -> size; P is that of learned positions."""
        heads = dict(N=self.heads, K=self.kv_heads, H=self.head_dim)
        return dict(V=self.vocab_size, D=self.embed, F=self.mlp, P=self.max_len, **heads)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "ModelConfig":
        d = dict(d)
        scaling = d.get("rope_scaling") or ()
        pairs = scaling.items() if isinstance(scaling, dict) else scaling
        d["rope_scaling"] = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in pairs))
        d["windows"] = tuple(d.get("windows") or ())
        return cls(**d)
