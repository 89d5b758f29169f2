"""Reads pairs of answers with people's preferences, measures how often people agree, and predicts preferences without a
language model."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

from common.errors import UserError
from common.types import Json
from data import formats, sources, splits
from data.examples import Chat, Completion, Group
from data.examples import Pair as Row
from evals.task import Prompt

WORD = re.compile(r"[^\W_]+|[!?]")


class Pair(NamedTuple):
    prompt: Prompt
    chosen: str
    rejected: str
    votes: tuple[int, ...] = (1,)  # one per person: 1 for `chosen`, -1 for `rejected`, 0 for a tie

    @property
    def key(self) -> int:
        """A hash of the prompt. It determines the fold, so that pairs with equal prompts are in the same fold."""
        return splits.key(text(self.prompt))


def text(prompt: Prompt) -> str:
    """Converts a prompt to plain text, with the speaker's role before each turn."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role'].title()}: {m['content']}" for m in prompt)


def read(source: str) -> list[Pair]:
    """Reads pairs from a data source whose rows are preferences or rankings. Rows with the same prompt and the same two
    answers are merged into one pair with several people's votes. Raises UserError for rows of any other kind."""
    found: dict[tuple[str, str, str], Pair] = {}
    for row in sources.rows(source):
        if row.record is None:
            raise UserError(row.reason, row.where)
        try:
            pairs = _pairs(row.record)
        except UserError as e:
            raise UserError(f"the row is neither a preference nor a ranking: {e.what}", row.where, e.fix) from None
        for pair in pairs:
            asked = text(pair.prompt)
            same, other = (asked, pair.chosen, pair.rejected), (asked, pair.rejected, pair.chosen)
            key, votes = (other, tuple(-v for v in pair.votes)) if other in found else (same, pair.votes)
            found[key] = found[key]._replace(votes=found[key].votes + votes) if key in found else pair
    if not found:
        raise UserError("there are no pairs", source)
    return list(map(_majority, found.values()))


def _pairs(record: Json) -> list[Pair]:
    found = formats.example(record)
    if isinstance(found, Row):
        tied = dict(found.numbers).get("tie", 0)
        return [_pair(found.chosen, found.rejected, 0 if tied else 1)]
    if isinstance(found, Group):
        values = found.values if found.column == "rating" else [-v for v in found.values]
        order = sorted(zip(values, found.answers, strict=True), key=lambda x: -x[0])
        return [_pair(a, b, int(u > v)) for i, (u, a) in enumerate(order) for v, b in order[i + 1 :]]
    raise UserError(f"a {found.kind} record does not contain two answers to a prompt")


def _pair(better: Completion | Chat, worse: Completion | Chat, vote: int) -> Pair:
    (prompt, chosen), (_, rejected) = map(_parts, (better, worse))
    return Pair(prompt, chosen, rejected, (vote,))


def _parts(found: Completion | Chat) -> tuple[Prompt, str]:
    if isinstance(found, Completion):
        return found.prompt, found.completion
    return list(found.messages[: found.first]), "\n\n".join(turn["content"] for turn in found.messages[found.first :])


def _majority(pair: Pair) -> Pair:
    """Returns the pair with its answers ordered such that `chosen` is the answer that most people prefer."""
    if sum(pair.votes) >= 0:
        return pair
    return Pair(pair.prompt, pair.rejected, pair.chosen, tuple(-v for v in pair.votes))


def decided(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs in which one answer has more votes than the other. Raises UserError if there are no such pairs."""
    if not (found := [pair for pair in pairs if sum(pair.votes)]):
        raise UserError("all pairs are ties", "pairs", "collect more votes")
    return found


def agreement(pairs: Iterable[Pair]) -> list[float]:
    """Returns, for every two people who judged the same pair, 1 if they agree, else 0."""
    return [float(a == b) for p in pairs for i, a in enumerate(p.votes) for b in p.votes[i + 1 :]]


def ceiling(agreed: float) -> float:
    """Returns the highest accuracy that any predictor can be expected to reach on single votes, given that two people
    agree with probability `agreed` and err independently.

    If people err with probability e, then agreed = (1 - e)^2 + e^2, and a predictor that always knows the better answer
    agrees with a single vote with probability 1 - e.
    """
    return (1 + max(0.0, 2 * agreed - 1) ** 0.5) / 2


def folds(pairs: Sequence[Pair], count: int) -> np.ndarray:
    """Returns the number [n] of the cross-validation fold to which each pair belongs. It depends only on the pair's
    prompt."""
    return np.array([pair.key % count for pair in pairs])


# --- predictors: each returns the probabilities [n] that people prefer `chosen`; 0.5 means a tie ---


def longest(pairs: Sequence[Pair]) -> np.ndarray:
    """Predicts that people prefer the answer with more characters."""
    return np.array([0.5 + 0.5 * np.sign(len(p.chosen) - len(p.rejected)) for p in pairs])


def words(texts: Sequence[str], least: int = 2) -> sparse.csr_matrix:
    """Returns a matrix [texts, words] with the square root of each word's count in each text. The columns are the words
    and the pairs of consecutive words that occur in at least `least` texts."""
    found = [_grams(text) for text in texts]
    often: dict[str, int] = {}
    for grams in found:
        for gram in set(grams):
            often[gram] = often.get(gram, 0) + 1
    column = {gram: i for i, gram in enumerate(sorted(g for g, n in often.items() if n >= least))}
    at = [(row, column[gram]) for row, grams in enumerate(found) for gram in grams if gram in column]
    rows, columns = np.array(at, int).reshape(-1, 2).T
    counts = sparse.csr_matrix((np.ones(len(at)), (rows, columns)), (len(texts), len(column)))  # sums repeated entries
    return counts.sqrt()


def _grams(text: str) -> list[str]:
    tokens = WORD.findall(text.lower())
    return tokens + [f"{a} {b}" for a, b in itertools.pairwise(tokens)]


def bag_of_words(pairs: Sequence[Pair], count: int = 5, l2: float = 10.0) -> np.ndarray:
    """Predicts preferences by logistic regression on the words of the answers. Each fold is predicted by a model that
    is fitted to the other folds."""
    both = words([p.chosen for p in pairs] + [p.rejected for p in pairs])
    return crossed(both[: len(pairs)] - both[len(pairs) :], folds(pairs, count), l2)


def crossed(x: np.ndarray | sparse.csr_matrix, fold: np.ndarray, l2: float) -> np.ndarray:
    """Uses x [n,D], the features of `chosen` minus those of `rejected`, to predict the probabilities [n] that people
    prefer `chosen`. Each fold is predicted by a `logistic` model that is fitted to the other folds."""
    out = np.full(x.shape[0], 0.5)
    for k in np.unique(fold):
        if (fold != k).any():
            out[fold == k] = sigmoid(x[fold == k] @ logistic(x[fold != k], l2=l2))
    return out


def logistic(
    x: np.ndarray | sparse.csr_matrix, sign: np.ndarray | None = None, l2: float = 1.0, start: np.ndarray | None = None
) -> np.ndarray:
    """Fits a Bradley-Terry model to feature differences x [n,D]: returns the weights w [D] that minimize sum log(1 +
    exp(-sign x w)) + l2/2 |w|^2. `sign` [n] is 1 for a pair whose first answer is preferred, and -1 for a pair whose
    second answer is; by default, it is 1 for all pairs."""
    sign = np.ones(x.shape[0]) if sign is None else sign

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ w)
        return np.logaddexp(0, -margin).sum() + l2 / 2 * w @ w, x.T @ (-sign * sigmoid(-margin)) + l2 * w

    begin = np.zeros(x.shape[1]) if start is None else start
    return optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def correct(p: np.ndarray) -> list[float]:
    """Scores predictions p, the probabilities that people prefer `chosen`: 1 if p is above one half, 0 if p is below
    one half, and 0.5 if p is one half."""
    return [0.5 + 0.5 * float(np.sign(round(float(x) - 0.5, 9))) for x in p]
