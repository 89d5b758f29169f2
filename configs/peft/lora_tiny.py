"""LoRA from end to end in seconds: the task of configs/sft/tiny.py with the base frozen.

    python -m train.main --config=configs/peft/lora_tiny.py --workdir=runs/lora_tiny [--config.init=runs/sft_tiny]

Hardware: a laptop CPU. Expected: the loss falls and the digest of the base does not change; see README. The held-out
questions also occur in training. On a random base LoRA learns slowly: set `init` to start from a trained base.
"""

from configs.sft import tiny


def get_config():
    c = tiny.get_config()
    c.peft.name = "lora"
    c.peft.rank = 8
    c.peft.alpha = 16.0
    return c
