"""Pretraining with int8 products, forward and backward, to compare with configs/pretrain/tiny.py on the same data.

    python -m train.main --config=configs/quant/int8_train_small.py --workdir=runs/int8_train

Hardware: a laptop CPU, which shows the quality but not the speed. Expected: held-out bits per byte close to those of
configs/pretrain/tiny.py, from which only the products differ.
"""

from configs.pretrain import tiny


def get_config():
    c = tiny.get_config()
    c.quant.name = "train8"
    return c
