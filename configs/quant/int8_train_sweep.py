"""Measures how much quality is lost by training with int8 matrix products, on configs/pretrain/tiny.py.

    python -m tools.sweep --config=configs/quant/int8_train_sweep.py --out=runs/sweeps/int8_train

For a single run, use train.main with --config=configs/pretrain/tiny.py --config.quant.name=train8. Hardware: a laptop
CPU, one minute per run. A run on a CPU shows the quality of int8 training, but not its speed on an accelerator.
Expected: after 100 steps, a held-out loss of 5.496 nats per token in float and 5.497 in int8 (see
results/int8_training.md).
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
