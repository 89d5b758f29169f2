"""How an answer is compared with a reference: one file for each scorer.

A file holds `score(answer, reference) -> float`, pure, in [0, 1], where 1 is right. A row with several references
counts the best of them.
"""

import importlib
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError, did_you_mean

VERSION = 1  # goes up when a scorer gives another score to the same answer
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
WORD = re.compile(r"[^\W_]+")

Scorer = Callable[[str, str], float]


def known() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))


def find(name: str) -> Scorer:
    if name not in known():
        raise UserError(
            f"no scorer {name!r}", "evals/scorers", did_you_mean(name, known(), f"known: {', '.join(known())}")
        )
    return importlib.import_module(f"evals.scorers.{name}").score


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces: the evaluation script of SQuAD 1.1 (2016)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1(matched: float, predicted: int, expected: int) -> float:
    """The harmonic mean of precision and recall; 1 where both sides are empty."""
    return 2 * matched / (predicted + expected) if predicted + expected else 1.0


def check(name: str, references: Sequence[str]) -> None:
    """Raises UserError for a reference that the scorer cannot compare anything with."""
    find(name)
    checked = getattr(importlib.import_module(f"evals.scorers.{name}"), "check", None)
    for reference in references if checked else ():
        checked(reference)
