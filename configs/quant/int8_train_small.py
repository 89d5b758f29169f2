"""Pretraining with int8 products, forwards and backwards, held against configs/pretrain/tiny.py on the same data.

    python -m train.main --config=configs/quant/int8_train_small.py --workdir=runs/int8_train

Hardware: a laptop CPU, on which it shows the quality and not the speed. Expected: held-out bits per byte close to those
of configs/pretrain/tiny.py, from which it differs in the products alone.
"""

from configs.pretrain import tiny


def get_config():
    c = tiny.get_config()
    c.quant.name = "train8"
    return c
