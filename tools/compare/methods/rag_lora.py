"""RAG with LoRA: prompts contain retrieved passages, both when the adapter is trained and when it is used."""

from infer.context import Context
from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, reading, trained
from tools.compare.methods.lora import ADAPTER, RATES
from tools.compare.methods.rag import PASSAGES, found


def method(c: Comparison, model: str) -> Method:
    how = "Prompts contain retrieved passages, both when the LoRA adapter is trained and when it is used."

    def settings(room: int) -> list[Setting]:
        k = min(PASSAGES[0], room)
        search = c.searches[0]
        ask, shown = Context(index=str(c.out / "index"), k=k, how=search), found(k, search)
        return [Setting({"lr": lr, **shown}, {**ADAPTER, "optim.lr": lr}, ask) for lr in RATES] if k else []

    made = reading(c, model, "RAG + LoRA", how, settings)
    return made if made.refused else trained(c, model, made.label, how, made.settings)._replace(documents=True)
