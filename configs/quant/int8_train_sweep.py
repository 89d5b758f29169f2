"""What int8 products cost in quality: the runs of configs/pretrain/tiny.py with and without, on the same data.

    python -m tools.sweep --config=configs/quant/int8_train_sweep.py --out=runs/sweeps/int8_train

Hardware: a laptop CPU, one minute a run; it shows the quality and not the speed. Expected: results/int8_training.md,
5.496 nats a token in float after 100 steps and 5.497 in int8.
"""

from configs.pretrain import tiny
from configs.sweeps import product


def get_config():
    c = tiny.get_config()
    c.steps = 100
    c.samples = ()
    return c


def sweep():
    yield from product({"quant.name": ("", "train8"), "seed": range(3)})
