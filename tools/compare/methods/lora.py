"""LoRA, which trains small matrices beside the frozen weights."""

from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, trained

RATES = 1e-3, 3e-4, 3e-3  # the first rate is the best in results/methods.md
ADAPTER = {"peft.name": "lora", "peft.rank": 16, "peft.alpha": 32.0}


def method(c: Comparison, model: str) -> Method:
    how = "Small matrices beside the frozen weights are trained on the training rows."
    settings = (Setting({"lr": lr}, {**ADAPTER, "optim.lr": lr}) for lr in RATES)
    return trained(c, model, "LoRA, rank 16", how, settings)
