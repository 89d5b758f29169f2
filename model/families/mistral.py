"""Mistral: Llama with a sliding window in every layer and without biases."""

from model.config import ModelConfig
from model.families import llama

KEYS = llama.KEYS
DEFAULTS = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072)


def config(hf: dict) -> ModelConfig:
    window = hf.get("sliding_window", 4096)
    windows = (window,) * hf.get("num_hidden_layers", 32) if window else ()
    return llama.config(hf, DEFAULTS, family="mistral", windows=windows, bias="none")


def hf_config(c: ModelConfig) -> dict:
    window = max(c.windows, default=0) or None
    ours = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return llama.hf_config(c) | ours
