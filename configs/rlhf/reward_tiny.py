"""Trains a reward model from end to end in seconds: a tiny model learns which sums of two one-digit numbers are right.

    python -m train.main --config=configs/rlhf/reward_tiny.py --workdir=runs/reward_tiny

Hardware: a laptop CPU. Expected: the loss starts at log 2 = 0.6931, because every reward is 0 at first, and then falls.
The accuracy, which is the fraction of pairs in which the right answer has the higher reward, rises above one half. The
pairs are synthetic, and all 100 questions occur in training, so the run shows that the code works, but says nothing
about people's preferences. After training, the following command scores two answers:

    python -c "import infer; print(infer.load('runs/reward_tiny').score(['6+7='] * 2, ['13', '14']))"
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 300
    c.model.shape = "tiny"
    c.objective.name = "reward"
    c.data.source = "synthetic:add_pairs?n=4000&digits=1"
    c.data.tokenizer = "bytes"
    c.data.packing = "none"
    c.data.seq_len = 32
    c.data.batch_size = 16
    c.optim.lr = 1e-3
    return c
