"""Scorers compare an answer with a reference. Each scorer is a file in this folder.

The file defines a pure function `score(answer, reference) -> float` in [0, 1], where 1 is right. If a row has several
references, its score is the best score over the references.
"""

import importlib
import re
import string
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError, did_you_mean

VERSION = 1  # increment this when a change in a scorer changes any score
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
    """Returns the text in lower case, with punctuation, articles and repeated spaces removed, as in the SQuAD 1.1
    evaluation script (2016)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1(matched: float, predicted: int, expected: int) -> float:
    """Returns F1, the harmonic mean of precision and recall, or 1 if both the answer and the reference are empty. The
    arguments count words or other items: those in both, those in the answer, and those in the reference."""
    return 2 * matched / (predicted + expected) if predicted + expected else 1.0


def checker(name: str) -> Callable[[str], None]:
    """Returns a function that raises UserError for a reference that the scorer cannot use."""
    find(name)
    return getattr(importlib.import_module(f"evals.scorers.{name}"), "check", lambda reference: None)
