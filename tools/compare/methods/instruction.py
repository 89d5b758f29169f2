"""Prompting with a system message. Several wordings are tried on validation rows, and the best one is tested."""

from infer.context import Context
from infer.context.instruction import BUILT_IN
from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting


def method(c: Comparison, model: str) -> Method:
    how = "A system message says how to answer; several wordings are tried."
    settings = (Setting({"instruction": text}, ask=Context(instruction=text)) for text in filter(None, BUILT_IN))
    return Method("instruction", how, tuple(settings))
