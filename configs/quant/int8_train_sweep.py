"""Measures how much quality int8 matrix products lose, by running configs/pretrain/tiny.py with and without them.

    python -m tools.sweep --config=configs/quant/int8_train_sweep.py --out=runs/sweeps/int8_train

For a single run, use train.main with --config=configs/pretrain/tiny.py --config.quant.name=train8. Hardware: a laptop
CPU, one minute per run. A CPU shows the quality of int8, but not its speed on an accelerator. Expected: after 100
steps, a held-out loss of 5.496 nats per token in float and 5.497 in int8 (see results/int8_training.md).
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
