"""Trains with int8 in seconds: runs configs/sft/tiny.py with all matrix products in the layers in 8 bits.

    python -m train.main --config=configs/quant/int8_train_tiny.py --workdir=runs/int8_train_tiny

Hardware: a laptop CPU, on which such small products are not faster in int8. Expected: the loss approaches 0, as it does
in float.
"""

from configs.sft import tiny


def get_config():
    c = tiny.get_config()
    c.quant.name = "train8"
    return c
