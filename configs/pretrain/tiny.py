"""Pretrains a small model from random weights, on the documentation of Python's standard library.

    python -m train.main --config=configs/pretrain/tiny.py --workdir=runs/pretrain_tiny

Hardware: a laptop CPU. Expected: the held-out loss falls. The training text consists of the docstrings of the installed
Python, so nothing is downloaded. The tokenizer is trained on the same text.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 300
    c.model.shape = "small"
    c.data.source = "pydocs"
    c.data.tokenizer = "bpe:2048"
    c.data.batch_size = 16
    c.optim.lr = 3e-3
    c.optim.weight_decay = 0.1
    c.eval_every = 100
    c.samples = ("Return the number of",)
    return c
