"""Mistral: Llama with a sliding window in every layer."""

from model.config import ModelConfig
from model.families import llama

KEYS = llama.KEYS


def config(hf: dict) -> ModelConfig:
    windows = (hf["sliding_window"],) * hf["num_hidden_layers"] if hf.get("sliding_window") else ()
    return llama.config(hf, family="mistral", windows=windows)


def hf_config(c: ModelConfig) -> dict:
    window = max(c.windows, default=0) or None
    ours = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return llama.hf_config(c) | ours
