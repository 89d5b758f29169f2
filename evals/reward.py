"""Computes rewards, numbers that say how good an answer is, for best-of-n sampling and for on-policy training. A reward
is specified as

    PART[,PART ...]      each PART is [WEIGHT*]KIND:NAME, for example 0.8*model:runs/reward,0.2*rule:length?most=100

KIND is one of these:
`scorer`   A file in evals/scorers, which compares the answer with the row's `answer` or `references`.
`model`    A reward model: a run folder, or the folder of an exported model.
`judge`    A model that grades the answer from 0 to 1; openai:URL#MODEL is a hosted model.
`rule`     A fixed rule. `length?most=N` gives 1 to answers of up to N words, 0 to answers of 2N words or more, and
           values between 1 and 0 to answers in between. `unrepeated` gives the number of distinct 4-grams of words in
           an answer, divided by the number of all its 4-grams. `ends` gives 1 to answers that end with a period, a
           question mark or an exclamation mark, and 0 to others.
Instead of KIND:NAME, you can write MODULE:FUNCTION to use a module of your own in the current folder. The function is
called as function(prompts, answers, rows) and returns one number per answer.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl

from common.errors import UserError, did_you_mean, reason
from common.types import Json
from evals import scorers
from evals.answers import references
from evals.rows import ANSWERS
from evals.task import Prompt

Rewards = Callable[[Sequence[Prompt], Sequence[str], Sequence[Json]], list[float]]
BATCH = 64  # maximum number of answers that are scored at once


def load(spec: str) -> Rewards:
    """Returns a function that computes the weighted sum of the parts of `spec`. Raises UserError for an invalid `spec`.
    The returned function raises UserError if a part does not give one number per answer."""
    parts = [_part(text.strip()) for text in spec.split(",")]

    def rewards(prompts: Sequence[Prompt], answers: Sequence[str], rows: Sequence[Json]) -> list[float]:
        total = [0.0] * len(answers)
        for at in range(0, len(answers), BATCH):
            batch = tuple(each[at : at + BATCH] for each in (prompts, answers, rows))
            for name, weight, part in parts:
                for i, value in enumerate(_checked(name, part(*batch), len(batch[1])), at):
                    total[i] += weight * value
        return total

    return rewards


def _checked(name: str, values: Any, expected: int) -> list[float]:
    """Converts the rewards of one part to floats. Raises UserError unless there is one finite number per answer."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(f"the rewards are not numbers: {reason(error)}", name) from None
    if len(found) != expected or not all(map(math.isfinite, found)):
        raise UserError(f"{len(found)} rewards for {expected} answers, but each answer needs one finite reward", name)
    return found


def _part(text: str) -> tuple[str, float, Rewards]:
    weight, star, name = text.partition("*")
    if not star:
        weight, name = "1", text
    kind, colon, rest = name.strip().partition(":")
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not (colon and kind and rest and math.isfinite(factor)):
        fix = f"KIND is one of {', '.join(KINDS)}; or write MODULE:FUNCTION"
        raise UserError(f"{text!r} is not [WEIGHT*]KIND:NAME", "reward", fix)
    return name, factor, KINDS.get(kind, lambda rest: _own(kind, rest))(rest)


def _scorer(name: str) -> Rewards:
    score = scorers.find(name)

    def rewards(prompts: Sequence[Prompt], answers: Sequence[str], rows: Sequence[Json]) -> list[float]:
        return [max(score(answer, r) for r in _references(row)) for answer, row in zip(answers, rows, strict=True)]

    return rewards


def _references(row: Json) -> list[str]:
    """The right answers of a row, which may come from a task or from a data source."""
    if found := references(row):
        return found
    fix = f"the column of the answer must be one of {', '.join(ANSWERS)}"
    raise UserError("a row has no answer to compare with", "reward scorer", fix)


def _model(folder: str) -> Rewards:
    from infer import models

    lm = models.load(folder)
    return lambda prompts, answers, rows: lm.score(prompts, answers)


def _judge(name: str) -> Rewards:
    from evals.judge import Judge

    judge = Judge(name)
    return lambda prompts, answers, rows: judge.rate(prompts, answers)


def _own(module: str, function: str) -> Rewards:
    """Imports a function from a module that is installed or in the current folder."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise UserError(f"the module cannot be imported: {reason(error)}", module) from None
        known = did_you_mean(module, KINDS, f"kinds are {', '.join(KINDS)}")
        raise UserError(f"{module!r} is neither a kind of reward nor a module", "reward", known) from None
    except (AttributeError, ImportError, SyntaxError) as error:
        raise UserError(f"the function cannot be imported: {reason(error)}", f"{module}:{function}") from None
    return found


# --- rules ---


def _rule(spec: str) -> Rewards:
    name, _, query = spec.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    most = options.pop("most", "") if name == "length" else "1"
    if name not in RULES or options or not most.isdecimal() or int(most) < 1:
        raise UserError(f"no rule {spec!r}", "reward", "write length?most=N, unrepeated or ends")
    rule = RULES[name]
    return lambda prompts, answers, rows: [rule(answer, int(most)) for answer in answers]


def length(answer: str, most: int) -> float:
    return min(1.0, max(0.0, 2 - len(answer.split()) / most))


def unrepeated(answer: str, _: int = 1) -> float:
    words = answer.lower().split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0


def ends(answer: str, _: int = 1) -> float:
    return float(answer.rstrip().rstrip("\"')*").endswith((".", "!", "?")))


RULES: dict[str, Callable[[str, int], float]] = {"length": length, "unrepeated": unrepeated, "ends": ends}
KINDS: dict[str, Callable[[str], Rewards]] = {"scorer": _scorer, "model": _model, "judge": _judge, "rule": _rule}
