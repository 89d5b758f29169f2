"""Runs quantization-aware training in seconds: configs/sft/tiny.py, with weights rounded to 4 bits from step 50 on.

    python -m train.main --config=configs/quant/qat_tiny.py --workdir=runs/qat_tiny

Hardware: a laptop CPU. Expected: the loss approaches 0, and tools.quantize turns the run into an int4 model with
outputs that are bit-identical to the outputs in training.
"""

from configs.sft import tiny


def get_config():
    c = tiny.get_config()
    c.quant.name = "qat"
    c.quant.format = "int4"
    c.quant.group = 32
    c.quant.start = 50  # train in float until this step, then with rounded weights, as in torchtune
    return c
