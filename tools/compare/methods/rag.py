"""Retrieval-augmented generation (RAG), which puts the best passages of the documents before the question."""

from infer.context import Context
from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, reading

PASSAGES = 3, 1, 8  # per question


def method(c: Comparison, model: str) -> Method:
    how = "The passages of the documents that fit the question best are put before it."
    asked = lambda k: Setting({"passages": k}, ask=Context(index=str(c.out / "index"), k=k))
    return reading(c, model, "RAG", how, lambda room: [asked(k) for k in PASSAGES if k <= room])
