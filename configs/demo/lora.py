"""The run of configs/demo/full.py with LoRA of rank 16 on every matrix of the layers: 3.6 % of the parameters.

    python -m train.main --config=configs/demo/lora.py --workdir=runs/demo/lora

Hardware: a laptop CPU, about 90 seconds. Expected: see README.
"""

from configs.demo import full


def get_config():
    c = full.get_config()
    c.peft.name = "lora"
    c.peft.rank = 16
    c.peft.alpha = 32.0
    c.optim.lr = 1e-3  # the best rate in results/methods.md, far above that of full fine-tuning
    return c
