"""How much of what rounding costs comes back by training for it: float, PTQ and QAT at 4 and 2 bits, on the same data.

    python -m tools.sweep --config=configs/quant/qat_sweep.py --out=runs/sweeps/qat

A run that starts to round after its last step is trained in float and evaluated in 4 bits: PTQ to the nearest number.
recovered = (QAT - PTQ) / (float - PTQ), of held-out losses. At 4 bits a column shares one scale, the coarsest that they
have, and at 2 bits 64 rows of it. Hardware: a laptop CPU, half a minute a run. Expected: means of three seeds 2.189 in
float; at 4 bits 2.230 by PTQ and 2.208 by QAT, in nats a byte; recovered 0.55 +- 0.13 (95 %, t of the three); at 2 bits
2.544 and 2.275; recovered 0.76 +- 0.05.
"""

from configs.pretrain import tiny
from configs.sweeps import product


def get_config():
    c = tiny.get_config()
    c.steps = 200
    c.model.shape = "tiny"
    c.data.tokenizer = "bytes"
    c.samples = ()
    c.quant.name = "qat"
    c.quant.format = "int4"
    c.quant.group = 4096  # more than a column has
    return c


def sweep():
    after, half_way = {"quant.start": 10**6}, {"quant.start": 100}
    low = {"quant.format": "int2", "quant.group": 64}
    yield from product([{"quant.name": ""}, after, half_way, low | after, low | half_way], {"seed": range(3)})
