"""Which method suits a task best? Trains every PEFT method and full fine-tuning, each at its own learning rate.

    python -m evals.export --task=dates --out=runs/dates
    python -m tools.sweep --config=configs/peft/methods.py --out=runs/sweeps/methods
    python -m tools.sweep --config=configs/peft/methods.py --sweep=best,seeds --out=runs/sweeps/methods-best \
        --metric=eval/dates --maximize

The first sweep compares learning rates. Hardware: a laptop CPU, 8 GB, 90 minutes. Expected: see results/methods.md.
"""

from configs import base
from configs.sweeps import product

RATES = {  # learning rates to try per method, the best rate first; "" is full fine-tuning
    "": (3e-5, 1e-5, 1e-4, 3e-4),
    "lora": (1e-3, 3e-4, 3e-3),
    "dora": (1e-3, 3e-4, 3e-3),
    "oft": (1e-4, 3e-5, 3e-4, 1e-3, 3e-3),
    "ia3": (3e-2, 1e-2, 1e-1),
    "bottleneck": (1e-3, 3e-4, 3e-3),
    "prefix": (1e-1, 3e-3, 1e-2, 3e-2, 3e-1),
    "prompt": (3e-2, 1e-2, 1e-1),
}


def get_config():
    c = base.get_config()
    c.steps = 24
    c.init = "smollm2-135m-instruct"
    c.data.source = "runs/dates/train.jsonl"
    c.data.eval_source = "runs/dates/heldout.jsonl"
    c.data.seq_len = 256
    c.data.batch_size = 2
    c.optim.warmup = 0.1
    c.eval_every = 0
    c.eval_batches = 4
    c.ckpt.every = 0
    return c


def sweep():
    return [{"peft.name": name, "optim.lr": rate} for name, rates in RATES.items() for rate in rates]


def sweep_best():
    return [{"peft.name": name, "optim.lr": rates[0]} for name, rates in RATES.items()]


def sweep_seeds():
    return product({"seed": range(3), "evals": (("dates",),), "eval_n": (32,), "eval_text": ("pydocs",)})
