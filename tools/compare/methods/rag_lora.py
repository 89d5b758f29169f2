"""RAG with LoRA: the adapter is trained on prompts with retrieved passages, and is prompted in the same way."""

from infer.context import Context
from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, reading, trained
from tools.compare.methods.lora import ADAPTER, RATES
from tools.compare.methods.rag import PASSAGES


def method(c: Comparison, model: str) -> Method:
    how = "LoRA on training rows with retrieved passages before their questions, then asked in the same way."

    def settings(room: int) -> list[Setting]:
        k = min(PASSAGES[0], room)
        ask = Context(index=str(c.out / "index"), k=k)
        return [Setting({"lr": lr, "passages": k}, {**ADAPTER, "optim.lr": lr}, ask) for lr in RATES] if k else []

    found = reading(c, model, "RAG + LoRA", how, settings)
    return found if found.refused else trained(c, model, found.label, how, found.settings)._replace(documents=True)
