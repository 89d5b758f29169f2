"""Scores of chunks for a question: BM25 by words, cosine by vectors, and the fusion of both."""

import logging
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

How = Literal["bm25", "dense", "rrf", "mean"]
WORD = re.compile(r"\w+")
BLOCK = 65_536  # vectors scored at a time
RANK = 60  # constant of reciprocal rank fusion (Cormack, Clarke, Büttcher 2009)


class Words:
    """BM25 over passages, by the library bm25s. `method` names a variant; Lucene's is never negative (Kamphuis et al.
    2020)."""

    def __init__(self, passages: Sequence[str], method: str = "lucene", k1: float = 1.5, b: float = 0.75):
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every call of `index`
        self.found = bm25s.BM25(method=method, k1=k1, b=b)
        self.found.index([words(passage) for passage in passages], show_progress=False)

    def scores(self, question: str) -> np.ndarray:
        """Scores [passages] in float32; 0 for passages that share no word with the question."""
        known = [word for word in dict.fromkeys(words(question)) if word in self.found.vocab_dict]
        if not known:
            return np.zeros(self.found.scores["num_docs"], np.float32)
        return self.found.get_scores(known)


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return WORD.findall(text.lower())


def cosines(vectors: np.ndarray, question: np.ndarray) -> np.ndarray:
    """Dot products [N] in float32 of vectors [N,D], possibly a float16 memory map, with the vector of a question
    [D]."""
    blocks = range(0, len(vectors), BLOCK)
    found = [vectors[at : at + BLOCK].astype(np.float32) @ question for at in blocks]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest scores in descending order; equal scores keep their order."""
    k = min(k, len(scores))
    if not k:
        return np.zeros(0, np.int64)
    least = np.partition(scores, -k)[-k]
    chosen = np.concatenate([np.flatnonzero(scores > least), np.flatnonzero(scores == least)])[:k]
    return chosen[np.argsort(-scores[chosen], kind="stable")]


def fuse(parts: Sequence[np.ndarray], how: How) -> np.ndarray:
    """Fuses several scores [N] into one: "mean" averages them, each scaled to [0, 1]; "rrf" adds 1 / (60 + rank)."""
    if how == "mean":
        spans = [(part.min(), np.ptp(part) or 1.0) for part in parts]
        return np.mean([(part - low) / span for part, (low, span) in zip(parts, spans, strict=True)], axis=0)
    ranks = [np.argsort(np.argsort(-part, kind="stable"), kind="stable") + 1 for part in parts]
    return np.sum([1 / (RANK + rank) for rank in ranks], axis=0)
