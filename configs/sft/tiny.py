"""Fine-tuning from end to end in seconds: a tiny model learns to answer sums of two numbers, character by character.

    python -m train.main --config=configs/sft/tiny.py --workdir=runs/sft_tiny

Hardware: a laptop CPU. Expected: the loss on the answers falls; see README. The loss counts the answers only. Start
here to read the code, or to try an idea: every method has a configuration of this size.
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
