"""Finds the learning rate and batch size for configs/sft/tiny.py, with a grid of twelve runs or a search over ranges.

    python -m tools.sweep --config=configs/sft/tiny_sweep.py --out=runs/sweeps/tiny --jobs=2
    python -m tools.sweep --config=configs/sft/tiny_sweep.py --out=runs/sweeps/search --search=tpe --trials=12

Hardware: a laptop CPU, two minutes. Expected: a held-out loss of 2.2 nats per token at a learning rate of 3e-4, and of
about 1.1 at 3e-3 and 3e-2. Two seeds are too few to distinguish the learning rates 3e-3 and 3e-2. The search needs the
packages in requirements/search.txt, and stops most trials early.
"""

from configs.sft import tiny
from configs.sweeps import choice, logspace, loguniform, product


def get_config():
    c = tiny.get_config()
    c.steps = 60
    c.eval_every = 10
    c.samples = ()
    return c


def sweep():
    yield from product({"optim.lr": logspace(3e-4, 3e-2, 3), "data.batch_size": (8, 16), "seed": range(2)})


def search():
    return {"optim.lr": loguniform(1e-4, 1e-1), "data.batch_size": choice(8, 16, 32)}
