"""QLoRA: LoRA on a base model that is stored in 4 bits to save memory."""

from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, trained
from tools.compare.methods.lora import ADAPTER, RATES


def method(c: Comparison, model: str) -> Method:
    how = "LoRA on a base model whose matrices are stored in 4 bits (NF4) to save memory."
    settings = (Setting({"lr": lr}, {**ADAPTER, "quant.name": "nf4", "optim.lr": lr}) for lr in RATES)
    return trained(c, model, "QLoRA, rank 16", how, settings)
