"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values, and a sliding window in some layers."""

from model.config import ModelConfig
from model.families import llama
from model.families._layout import Key

KEYS = llama.KEYS | {
    "layers/attn/bq": Key(llama.LAYER + "self_attn.q_proj.bias", "(NH)->NH"),
    "layers/attn/bk": Key(llama.LAYER + "self_attn.k_proj.bias", "(KH)->KH"),
    "layers/attn/bv": Key(llama.LAYER + "self_attn.v_proj.bias", "(KH)->KH"),
}


def config(hf: dict) -> ModelConfig:
    return llama.config(hf, family="qwen2", bias="qkv", windows=llama.windows(hf))


def hf_config(c: ModelConfig) -> dict:
    ours = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return llama.hf_config(c) | llama.window_config(c) | ours
