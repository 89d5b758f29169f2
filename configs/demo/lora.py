"""The run of configs/demo/full.py with 3.6 % of the parameters: LoRA of rank 16 on every layer's matrices.

    python -m train.main --config=configs/demo/lora.py --workdir=runs/demo/lora

Hardware: a laptop CPU, about a minute and a half. Expected: see README.
"""

from configs.demo import full


def get_config():
    c = full.get_config()
    c.peft.name = "lora"
    c.peft.rank = 16
    c.peft.alpha = 32.0
    c.optim.lr = 1e-3  # the best of those in results/methods.md, far above full fine-tuning
    return c
