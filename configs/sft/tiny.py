"""Runs fine-tuning from end to end in seconds: a tiny model memorizes the 100 sums of two one-digit numbers.

    python -m train.main --config=configs/sft/tiny.py --workdir=runs/sft_tiny

Hardware: a laptop CPU. Expected: the loss on the answers approaches 0. The run shows that the code works, but not that
the model can add, because each held-out question also occurs in training. With digits=3 in `data.source`, few held-out
questions occur in training.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 200
    c.model.shape = "tiny"
    c.data.source = "synthetic:add?n=4000&digits=1"
    c.data.tokenizer = "bytes"
    c.data.seq_len = 64
    c.data.batch_size = 16
    c.optim.lr = 3e-3
    c.samples = ("2+3=", "7+5=")
    return c
