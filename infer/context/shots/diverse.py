"""Picks examples that represent the pool but are not similar to each other. All questions get the same examples.

Examples are chosen greedily to maximize the facility location function: the sum, over all examples in the pool, of the
similarity to the nearest chosen example (Lin and Bilmes 2011, "A class of submodular functions for document
summarization"). The similarity of two examples is the cosine of their vectors. An example's vector has one entry for
each word of its question and answer: the word's inverse document frequency.
"""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from infer.context.shots import Picker
from infer.retrieve.search import words

MOST = 1000  # maximum number of candidates; they are drawn at random from the pool


def picker(pool: Sequence[tuple[str, str]], seed: int) -> Picker:
    drawn = random.Random(seed).sample(range(len(pool)), min(MOST, len(pool)))
    near = similarities([f"{question} {answer}" for question, answer in (pool[i] for i in drawn)])
    order: list[int] = []
    covered, free = np.zeros(len(drawn), np.float32), np.ones(len(drawn), bool)

    def chosen(n: int) -> list[int]:
        while len(order) < min(n, len(drawn)):
            gains = np.where(free, np.maximum(near, covered).sum(1), -1)
            best = int(np.argmax(gains))
            covered[:] = np.maximum(covered, near[best])
            free[best] = False
            order.append(drawn[best])
        return order[:n]

    return lambda questions, n: [chosen(n)] * len(questions)


def similarities(texts: Sequence[str]) -> np.ndarray:
    """Computes the cosine similarities [N,N] between texts, in float32."""
    found = [set(words(text)) for text in texts]
    counts = Counter(word for row in found for word in row)
    shared = {word: i for i, word in enumerate(w for w, count in counts.items() if count > 1)}
    vectors = np.zeros((len(texts), len(shared)), np.float32)
    for row, own in zip(vectors, found, strict=True):
        for word in own & shared.keys():
            row[shared[word]] = np.log(len(texts) / counts[word]) + 1
    norms = [sum((np.log(len(texts) / counts[word]) + 1) ** 2 for word in own) for own in found]
    vectors /= np.sqrt(np.maximum(norms, 1e-12))[:, None]
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, 1)
    return cosines
