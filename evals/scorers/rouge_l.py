"""Scores ROUGE-L (Lin 2004), which is the F1 of the longest common subsequence of words.

Words are runs of letters and digits in lower case, without stemming, as in the defaults of the package rouge_score.
"""

from evals.scorers import WORD, f1


def score(answer: str, reference: str) -> float:
    said, wanted = WORD.findall(answer.lower()), WORD.findall(reference.lower())
    return f1(common(said, wanted), len(said), len(wanted))


def common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence. The algorithm is bit-parallel: the bits of one integer hold a row
    of the dynamic-programming table (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    whole = row = (1 << len(a)) - 1
    for word in b:
        here = row & places.get(word, 0)
        row = (row + here | row - here) & whole
    return len(a) - row.bit_count()
