"""Qwen3: Llama with an RMSNorm on each query head and key head, and with a sliding window in some layers."""

from model.config import ModelConfig
from model.families import llama, qwen2
from model.families._layout import Key

KEYS = llama.KEYS | {
    "layers/attn/q_norm": Key(llama.LAYER + "self_attn.q_norm.weight", "H->H"),
    "layers/attn/k_norm": Key(llama.LAYER + "self_attn.k_norm.weight", "H->H"),
}


def config(hf: dict) -> ModelConfig:
    hf = hf | {"mlp_bias": None}  # Qwen3 has no such key
    head_dim = hf.get("head_dim") or 128  # Qwen3's default head size is 128, whatever the hidden size
    own = dict(family="qwen3", qk_norm=True, head_dim=head_dim, windows=llama.windows(hf))
    return llama.config(hf, qwen2.DEFAULTS, **own)


def hf_config(c: ModelConfig) -> dict:
    ours = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return llama.hf_config(c) | llama.window_config(c) | ours
