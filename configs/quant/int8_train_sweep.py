"""What int8 products cost in quality: the runs of configs/pretrain/tiny.py with and without, on the same data.

    python -m tools.sweep --config=configs/quant/int8_train_sweep.py --out=runs/sweeps/int8_train

Hardware: a laptop CPU, one to two minutes a run; it shows the quality and not the speed. Expected: about 5.5 nats a
token in float after 100 steps; the gap is the mean of the three differences of runs of the same seed.
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
