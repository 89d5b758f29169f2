"""Full fine-tuning, which trains all weights of the model."""

from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, trained

RATES = 3e-5, 1e-4, 1e-5  # learning rates; the first was the best in results/methods.md


def method(c: Comparison, model: str) -> Method:
    how = "All weights are trained on the training rows."
    settings = (Setting({"lr": lr}, {"peft.name": "", "optim.lr": lr}) for lr in RATES)
    return trained(c, model, "full fine-tuning", how, settings)
