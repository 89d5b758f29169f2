"""How large must an adapter be? Compares ranks, methods, learning rates and full fine-tuning on one model.

    python -m train.main --config=configs/pretrain/tiny.py --workdir=runs/pretrain
    python -m tools.sweep --config=configs/peft/rank_sweep.py --out=runs/sweeps/rank --jobs=2

The sweep's page plots the held-out loss on the addition task, and forgetting, against the rank and against the number
of trained parameters. Each point uses the best learning rate. Forgetting is the increase in the loss on Python
documentation, on which the base model was trained. `--sweep=seeds,best` repeats the comparison with three seeds and one
learning rate. Hardware: a laptop CPU, 15 minutes. Expected: with LoRA at a learning rate of 3e-3 and one seed, the loss
is 1.33 nats at rank 1, 0.93 at rank 4 and 0.92 at rank 16. Forgetting falls from 5.8 nats at rank 1 to 0.9 nats at rank
64, because the scale alpha / rank falls.
"""

from configs import base
from configs.sweeps import chain, product

RANKS, METHODS = (1, 4, 16, 64), ("lora", "dora")


def get_config():
    c = base.get_config()
    c.init = "runs/pretrain"
    c.steps = 150
    c.data.source = "synthetic:add?n=4000&digits=2"
    c.data.seq_len = 64
    c.data.batch_size = 16
    c.optim.lr = 3e-3
    c.peft.name = "lora"
    c.peft.rank = 16
    c.eval_text = "pydocs"
    return c


def sweep():
    adapters = product({"peft.name": METHODS, "peft.rank": RANKS, "optim.lr": (1e-3, 4e-3, 1.6e-2)})
    yield from chain(adapters, product({"peft.name": ("",), "optim.lr": (2.5e-4, 1e-3, 4e-3)}))


def sweep_best():
    return product({"peft.name": METHODS, "peft.rank": RANKS})


def sweep_seeds():
    return [{"seed": seed} for seed in range(3)]
