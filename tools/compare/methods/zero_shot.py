"""Zero-shot prompting with only the question, as a baseline that needs no preparation."""

from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting


def method(c: Comparison, model: str) -> Method:
    return Method("zero-shot", "The prompt is the question and nothing else.", (Setting({}),))
