"""How much of the rounding loss does QAT recover? Float, PTQ and QAT at 4 and 2 bits, on the same data.

    python -m tools.sweep --config=configs/quant/qat_sweep.py --out=runs/sweeps/qat

A run in which rounding starts after the last step is trained in float and evaluated in 4 bits: this is PTQ by rounding
to nearest. recovered = (QAT - PTQ) / (float - PTQ), computed from held-out losses. At 4 bits each column has one scale,
the coarsest choice; at 2 bits, 64 rows of a column share one scale. Hardware: a laptop CPU, half a minute per run.
Expected: float 2.189 (means of three seeds, nats per byte); at 4 bits PTQ 2.230 and QAT 2.208, recovered 0.55 +- 0.13
(Student's 95 % interval); at 2 bits PTQ 2.544 and QAT 2.275, recovered 0.76 +- 0.05.
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
    c.quant.group = 4096  # more rows than any column has: one scale per column
    return c


def sweep():
    never, halfway = {"quant.start": 10**6}, {"quant.start": 100}
    low = {"quant.format": "int2", "quant.group": 64}
    yield from product([{"quant.name": ""}, never, halfway, low | never, low | halfway], {"seed": range(3)})
