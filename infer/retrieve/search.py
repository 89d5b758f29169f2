"""Computes how well chunks match a question: by words (BM25), by the cosine similarity of vectors, or by a fusion of
both scores."""

import logging
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

How = Literal["bm25", "dense", "rrf", "mean"]
WORD = re.compile(r"\w+")
BLOCK = 65_536  # number of vectors that are scored at a time
RANK = 60  # constant of reciprocal rank fusion (Cormack, Clarke, Büttcher 2009)


class Words:
    """Computes BM25 scores of passages with the library bm25s. `method` names a variant of BM25. The scores of the
    variant "lucene" are never negative (Kamphuis et al. 2020)."""

    def __init__(self, passages: Sequence[str], method: str = "lucene", k1: float = 1.5, b: float = 0.75):
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # otherwise bm25s logs every call to `index`
        self.found = bm25s.BM25(method=method, k1=k1, b=b)
        self.found.index([words(passage) for passage in passages], show_progress=False)

    def scores(self, question: str) -> np.ndarray:
        """Returns one score per passage, in float32. Passages that share no word with the question have score 0."""
        known = [word for word in dict.fromkeys(words(question)) if word in self.found.vocab_dict]
        if not known:
            return np.zeros(self.found.scores["num_docs"], np.float32)
        return self.found.get_scores(known)


def words(text: str) -> list[str]:
    """The words of a text in lower case. A word consists of letters, digits and underscores."""
    return WORD.findall(text.lower())


def cosines(vectors: np.ndarray, question: np.ndarray) -> np.ndarray:
    """Computes the dot products [N] in float32 of vectors [N,D] with the vector of a question [D]. `vectors` may be a
    memory map in float16."""
    blocks = range(0, len(vectors), BLOCK)
    found = [vectors[at : at + BLOCK].astype(np.float32) @ question for at in blocks]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the indices of the k highest scores, in descending order of the scores. Ties keep their original
    order."""
    k = min(k, len(scores))
    if not k:
        return np.zeros(0, np.int64)
    least = np.partition(scores, -k)[-k]
    chosen = np.concatenate([np.flatnonzero(scores > least), np.flatnonzero(scores == least)])[:k]
    return chosen[np.argsort(-scores[chosen], kind="stable")]


def fuse(parts: Sequence[np.ndarray], how: How) -> np.ndarray:
    """Fuses several arrays of scores [N] into one array. The method "mean" scales each array to [0, 1] and averages the
    arrays. The method "rrf" adds up 1 / (60 + rank) over the arrays, where rank 1 is the highest score of an array."""
    if how == "mean":
        spans = [(part.min(), np.ptp(part) or 1.0) for part in parts]
        return np.mean([(part - low) / span for part, (low, span) in zip(parts, spans, strict=True)], axis=0)
    ranks = [np.argsort(np.argsort(-part, kind="stable"), kind="stable") + 1 for part in parts]
    return np.sum([1 / (RANK + rank) for rank in ranks], axis=0)
