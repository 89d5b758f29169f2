"""Asks a judge model to compare two answers, which it sees in both orders, or to grade a single answer."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evals import pairs
from evals.task import Prompt
from infer import hosted
from infer.hosted import Hosted
from infer.lm import LM

PAIR = """\
Here is a conversation, and two answers to its last message.

[conversation]
{prompt}
[answer A]
{first}
[answer B]
{second}
[end]

Which answer is better? Reply with one letter: A, B, or C if both are equally good."""
SINGLE = """\
Here is a conversation, and an answer to its last message.

[conversation]
{prompt}
[answer]
{answer}
[end]

How good is the answer? Reply with one digit, from 1 (bad) to 5 (excellent)."""
LETTERS, DIGITS = "ABC", "12345"
ROOM = 16  # maximum number of tokens in a hosted judge's reply
CHUNK = 32  # number of questions that are scored at a time


class Verdict(NamedTuple):
    """`p` is the probability that the first answer is better, averaged over both orders. `votes` holds two votes: one
    with the answers shown in the given order, one with them swapped. A vote is 1 if the judge prefers the answer that
    comes first in the given order, -1 if it prefers the other answer, and 0 for a tie or an unreadable reply."""

    p: float
    votes: tuple[int, int]

    @property
    def winner(self) -> int:
        """1 if both votes are for the first answer, -1 if both are for the second answer, else 0 (a tie)."""
        return self.votes[0] if self.votes[0] == self.votes[1] else 0


class Judge:
    """Judges answers with the model `name`, which may be local or hosted."""

    def __init__(self, name: str, lm: LM | Hosted | None = None):
        self.name, self.lm, self.unread = name, lm or hosted.load(name), 0

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[Verdict]:
        both = [
            PAIR.format(prompt=pairs.text(prompt).strip(), first=a.strip(), second=b.strip())
            for order in ((firsts, seconds), (seconds, firsts))
            for prompt, a, b in zip(prompts, *order, strict=True)
        ]
        p = self._read(both, LETTERS)  # [2n,3]
        better, votes = p[:, 0] + p[:, 2] / 2, _votes(p)
        n = len(prompts)
        chance = (better[:n] + 1 - better[n:]) / 2
        return [Verdict(float(chance[i]), (votes[i], -votes[n + i])) for i in range(n)]

    def rate(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Returns the judge's expected grade for each answer, rescaled to the range from 0 to 1."""
        texts = [
            SINGLE.format(prompt=pairs.text(prompt).strip(), answer=answer.strip())
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return (self._read(texts, DIGITS) @ np.linspace(0, 1, len(DIGITS))).tolist()

    def _read(self, texts: Sequence[str], options: str) -> np.ndarray:
        """Returns probabilities [n,options]: for each text, how likely the judge is to reply with each of the options.
        A hosted judge gives a single reply, and the option in this reply gets probability 1. If the reply names no
        option, all options get the same probability."""
        if isinstance(self.lm, Hosted):
            replies = self.lm.generate([[{"role": "user", "content": t}] for t in texts], max_new_tokens=ROOM)
            found = [re.search(rf"\b[{options}]\b", reply) for reply in replies]
            self.unread += sum(match is None for match in found)
            rows = [np.array([float(o == match[0]) for o in options]) if match else None for match in found]
            return np.array([np.full(len(options), 1 / len(options)) if row is None else row for row in rows])
        raw = self.lm.tokenizer.chat_template is None
        asked = [f"{t}\nReply: " if raw else [{"role": "user", "content": t}] for t in texts]
        logps: list[float] = []
        for at in range(0, len(asked), CHUNK):
            flat = [(prompt, option) for prompt in asked[at : at + CHUNK] for option in options]
            logps += [logp for logp, _ in self.lm.logps([q for q, _ in flat], [o for _, o in flat])]
        table = np.array(logps).reshape(len(texts), len(options))
        table = np.exp(table - table.max(1, keepdims=True))
        return table / table.sum(1, keepdims=True)


def _votes(p: np.ndarray) -> list[int]:
    """The vote for each row of letter probabilities p [n,3]: 1 if A is the most probable letter, -1 if B is, 0 if C is.
    If two letters are equally probable, the vote is 0."""
    top = p.max(1, keepdims=True)
    best = np.isclose(p, top)
    return [0 if row.sum() > 1 or row[2] else 1 if row[0] else -1 for row in best]


def bias(verdicts: Sequence[Verdict]) -> tuple[float | None, float]:
    """Returns (share of non-tied votes that are for the answer shown first, share of pairs whose votes differ between
    the two orders).

    If the judge has no position bias, the first share is one half. The first share is None if all votes are ties."""
    shown = [vote for v in verdicts for vote in (v.votes[0], -v.votes[1]) if vote]
    first = sum(vote > 0 for vote in shown) / len(shown) if shown else None
    return first, sum(v.votes[0] != v.votes[1] for v in verdicts) / len(verdicts)
