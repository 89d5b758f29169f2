"""Mistral: Llama with a sliding window in every layer."""

from model.config import ModelConfig
from model.families import llama

KEYS = llama.KEYS


def config(hf: dict) -> ModelConfig:
    window = hf.get("sliding_window", 4096)
    windows = (window,) * hf["num_hidden_layers"] if window else ()
    return llama.config(hf, family="mistral", windows=windows)


def hf_config(c: ModelConfig) -> dict:
    window = max(c.windows, default=0) or None
    ours = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return llama.hf_config(c) | ours
