"""How much of what rounding to 4 bits costs comes back by training for it: float, PTQ and QAT on the same data.

    python -m tools.sweep --config=configs/quant/qat_sweep.py --out=runs/sweeps/qat --jobs=2

A run that starts to round after its last step is trained in float and evaluated in 4 bits: PTQ to the nearest number.
recovered = (QAT - PTQ) / (float - PTQ), by held-out loss, with a scale for 32 weights and for a whole column. There is
no format below 4 bits. Hardware: a laptop CPU. Expected: the QAT runs recover most of the loss in both.
"""

from configs.quant import qat_tiny
from configs.sweeps import product


def get_config():
    c = qat_tiny.get_config()
    c.samples = ()
    return c


def sweep():
    rounded = product({"quant.group": (32, 4096), "quant.start": (50, 10**6)})  # 4096: more than a column has
    yield from product([{"quant.name": ""}, *rounded], {"seed": range(3)})
