"""Trains LoRA from end to end in seconds, on the task of configs/sft/tiny.py. The base model is frozen.

    python -m train.main --config=configs/peft/lora_tiny.py --workdir=runs/lora_tiny [--config.init=runs/sft_tiny]

Hardware: a laptop CPU. Expected: the loss falls, and the digest (hash) of the base weights does not change. The
held-out questions also occur in training, so the held-out loss does not show whether the model can add. LoRA learns
slowly on a randomly initialized base model; set `init` to start from a trained one.
"""

from configs.sft import tiny


def get_config():
    c = tiny.get_config()
    c.peft.name = "lora"
    c.peft.rank = 8
    c.peft.alpha = 16.0
    return c
