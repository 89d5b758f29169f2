"""Retrieval-augmented generation (RAG): the prompt shows the passages of the documents that match the question best."""

from infer.context import Context
from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, reading

PASSAGES = 3, 1, 8  # per question


def method(c: Comparison, model: str) -> Method:
    how = "The prompt shows the passages of the documents that match the question best."
    asked = lambda k: Setting({"passages": k}, ask=Context(index=str(c.out / "index"), k=k))
    return reading(c, model, "RAG", how, lambda room: [asked(k) for k in PASSAGES if k <= room])
