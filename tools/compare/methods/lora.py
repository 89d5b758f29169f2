"""LoRA, which freezes the model's weights and trains small matrices that are added to them."""

from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, trained

RATES = 1e-3, 3e-4, 3e-3  # learning rates; the first was the best in results/methods.md
ADAPTER = {"peft.name": "lora", "peft.rank": 16, "peft.alpha": 32.0}


def method(c: Comparison, model: str) -> Method:
    how = "The weights are frozen, and small matrices added to them are trained on the training rows."
    settings = (Setting({"lr": lr}, {**ADAPTER, "optim.lr": lr}) for lr in RATES)
    return trained(c, model, "LoRA, rank 16", how, settings)
