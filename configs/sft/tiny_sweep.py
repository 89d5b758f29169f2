"""Which learning rate and batch suit the tiny model that learns sums: twelve runs, or a search over ranges.

    python -m tools.sweep --config=configs/sft/tiny_sweep.py --out=runs/sweeps/tiny --jobs=2
    python -m tools.sweep --config=configs/sft/tiny_sweep.py --out=runs/sweeps/search --search=tpe --trials=12

Hardware: a laptop CPU. Expected: a few minutes and a page with the best learning rate near 3e-3, seeds as intervals.
The search needs requirements/search.txt; it stops most trials after their first evaluations.
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
