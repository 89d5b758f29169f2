"""Training with int8 products in seconds: the run of configs/sft/tiny.py, every matrix product of the layers in 8 bits.

    python -m train.main --config=configs/quant/int8_train_tiny.py --workdir=runs/int8_train_tiny

Hardware: a laptop CPU, on which small products gain nothing. Expected: the loss nears 0 as there.
"""

from configs.sft import tiny


def get_config():
    c = tiny.get_config()
    c.quant.name = "train8"
    return c
