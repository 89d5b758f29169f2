"""Quantization-aware training from end to end in seconds: the run of configs/sft/tiny.py, 4 bits a weight from step 50.

    python -m train.main --config=configs/quant/qat_tiny.py --workdir=runs/qat_tiny

Hardware: a laptop CPU. Expected: the loss nears 0 as there, and tools.quantize makes the int4 model of the run, whose
outputs are those that were trained, bit for bit.
"""

from configs.sft import tiny


def get_config():
    c = tiny.get_config()
    c.quant.name = "qat"
    c.quant.format = "int4"
    c.quant.group = 32
    c.quant.start = 50  # a float model settles first (torchtune's delayed start)
    return c
