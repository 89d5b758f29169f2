"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and with a sliding window in some layers."""

from model.config import ModelConfig
from model.families import llama

KEYS = llama.KEYS
DEFAULTS = dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
)  # fmt: skip


def config(hf: dict) -> ModelConfig:
    return llama.config(hf, DEFAULTS, family="qwen2", bias="qkv", windows=llama.windows(hf))


def hf_config(c: ModelConfig) -> dict:
    ours = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return llama.hf_config(c) | llama.window_config(c) | ours
