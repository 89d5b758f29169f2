"""How much of the quality lost to rounding does quantization-aware training (QAT) recover? Compares float training,
post-training quantization (PTQ) and QAT at 4 and 2 bits, on the same data.

    python -m tools.sweep --config=configs/quant/qat_sweep.py --out=runs/sweeps/qat

In a PTQ run, rounding starts only after the last step: the model is trained in float and evaluated with weights rounded
to nearest. The recovered fraction is (QAT - PTQ) / (float - PTQ), computed from held-out losses. At 4 bits, each column
has one scale, which is the coarsest setting. At 2 bits, each group of 64 rows of a column has its own scale.

Hardware: a laptop CPU, half a minute per run. Expected: a loss of 2.189 nats per byte in float (all losses are means of
three seeds). At 4 bits, the loss is 2.230 with PTQ and 2.208 with QAT, which recovers a fraction of 0.55 +- 0.13
(Student's 95 % interval). At 2 bits, the loss is 2.544 with PTQ and 2.275 with QAT, which recovers 0.76 +- 0.05.
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
    c.quant.group = 4096  # more rows than any matrix has, so each column has one scale
    return c


def sweep():
    never, halfway = {"quant.start": 10**6}, {"quant.start": 100}
    low = {"quant.format": "int2", "quant.group": 64}
    yield from product([{"quant.name": ""}, never, halfway, low | never, low | halfway], {"seed": range(3)})
