"""Runs DPO from end to end in seconds: a tiny model memorizes which sums of two one-digit numbers are right.

    python -m train.main --config=configs/rlhf/dpo_tiny.py --workdir=runs/dpo_tiny

Hardware: a laptop CPU. Expected: the loss starts at log 2 = 0.6931, because the policy and the reference are the same
model at first, and then falls. The accuracy, which is the fraction of pairs in which the right answer has the higher
reward, rises above one half. All 100 questions occur in training, so the run shows that the code works, but says
nothing about unseen sums.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 200
    c.model.shape = "tiny"
    c.objective.name = "dpo"
    c.objective.beta = 0.1
    c.data.source = "synthetic:add_pairs?n=4000&digits=1"
    c.data.tokenizer = "bytes"
    c.data.packing = "none"
    c.data.seq_len = 32
    c.data.batch_size = 16
    c.optim.lr = 1e-3
    return c
