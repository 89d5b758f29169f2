"""An adapter on a recurrent model: LoRA on RG-LRU layers and local attention (Griffin, arXiv 2402.19427) in seconds.

    python -m train.main --config=configs/peft/recurrent_tiny.py --workdir=runs/recurrent_tiny

Hardware: a laptop CPU. Expected: the loss falls below 1 nat per token and the base does not change. The method needs no
code for recurrent layers: `where` matches their gates and projections like any other matrix. For full tuning of the
same shape: --config.peft.name= ; to plan a larger model: --config.model.shape=recurrentgemma-2b --plan.
"""

from configs.sft import tiny


def get_config():
    c = tiny.get_config()
    c.model.shape = "tiny-griffin"
    c.peft.name = "lora"
    c.peft.rank = 8
    c.peft.alpha = 16.0
    return c
