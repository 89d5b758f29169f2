"""Trains LoRA on a recurrent model of RG-LRU layers and local attention (Griffin, arXiv 2402.19427) in seconds.

    python -m train.main --config=configs/peft/recurrent_tiny.py --workdir=runs/recurrent_tiny

Hardware: a laptop CPU. Expected: the loss falls below 1 nat per token, and the base weights do not change. LoRA needs
no special code for recurrent layers: the option `where` matches the matrices of their gates and projections like any
other matrix. For full fine-tuning of the same shape, set --config.peft.name to the empty string. To plan a larger
model, add --config.model.shape=recurrentgemma-2b --plan.
"""

from configs.sft import tiny


def get_config():
    c = tiny.get_config()
    c.model.shape = "tiny-griffin"
    c.peft.name = "lora"
    c.peft.rank = 8
    c.peft.alpha = 16.0
    return c
