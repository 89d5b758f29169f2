"""Few-shot prompting: the prompt shows solved examples from the training rows before the question."""

from infer.context import Context
from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting

SHOTS = (4, "fixed"), (4, "nearest"), (1, "fixed"), (16, "nearest"), (16, "fixed")


def method(c: Comparison, model: str) -> Method:
    base = c.bases[model]
    fit = [(n, pick) for n, pick in SHOTS if n <= c.room(model, base.prompt + base.answer)]
    how = "The prompt shows solved examples from the training rows before the question."
    if not fit:
        return Method("few-shot", how, refused="not even one example fits into the model's context")
    settings = (Setting({"shots": n, "pick": pick}, ask=Context(shots=n, pick=pick)) for n, pick in fit)
    return Method("few-shot", how, tuple(settings))
