"""Trains QLoRA from end to end in seconds: runs configs/peft/lora_tiny.py on a 4-bit base model.

    python -m train.main --config=configs/quant/qlora_tiny.py --workdir=runs/qlora_tiny [--config.init=runs/sft_tiny]

Hardware: a laptop CPU. Expected: the loss falls as in configs/peft/lora_tiny.py; --plan shows that the frozen matrices
of the layers take 4.13 bits per weight.
"""

from configs.peft import lora_tiny


def get_config():
    c = lora_tiny.get_config()
    c.quant.name = "nf4"
    c.optim.lr = 1e-2
    return c
