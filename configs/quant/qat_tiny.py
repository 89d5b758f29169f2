"""Runs quantization-aware training in seconds: configs/sft/tiny.py with 4 bits per weight from step 50.

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
    c.quant.start = 50  # rounding starts at this step, after training in float (like torchtune's delayed start)
    return c
