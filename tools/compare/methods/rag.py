"""Retrieval-augmented generation (RAG): the prompt shows the passages of the documents that match the question best."""

from common.types import Leaf
from infer.context import Context
from infer.retrieve.search import How
from tools.compare.inputs import Comparison
from tools.compare.method import Method, Setting, reading

PASSAGES = 3, 1, 8  # per question


def method(c: Comparison, model: str) -> Method:
    how = "The prompt shows the passages of the documents that match the question best."

    def settings(room: int) -> list[Setting]:
        fit = [k for k in PASSAGES if k <= room]
        pairs = [*((k, search) for k in fit[:1] for search in c.searches), *((k, c.searches[0]) for k in fit[1:])]
        return [
            Setting(found(k, search), ask=Context(index=str(c.out / "index"), k=k, how=search)) for k, search in pairs
        ]

    return reading(c, model, "RAG", how, settings)


def found(k: int, search: How | None) -> dict[str, Leaf]:
    """Describes how passages are found, for the page."""
    return {"passages": k} | ({"search": search} if search else {})
