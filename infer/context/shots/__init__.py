"""Few-shot prompting puts solved examples before a question. Each file in this folder implements one method of picking
the examples.

Each file defines `picker(pool, seed)`, where `pool` is a list of (question, answer) texts. It returns a function
`pick(questions, n)`. For each question, this function returns the indices of n examples in the pool, in the order in
which the prompt shows them.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from common.errors import UserError, did_you_mean

Prompt = str | list[dict]
Shot = tuple[Prompt, str]  # a question and its answer
Picker = Callable[[Sequence[str], int], list[list[int]]]


def known() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))


def find(name: str) -> ModuleType:
    """Imports the module that implements a method of picking examples. Raises UserError for an unknown name."""
    if name not in known():
        fix = did_you_mean(name, known(), f"known: {', '.join(known())}")
        raise UserError(f"no method {name!r} of picking examples", "infer/context/shots", fix)
    return importlib.import_module(f"infer.context.shots.{name}")


def picker(name: str, pool: Sequence[Shot], n: int, seed: int) -> Picker:
    """Returns the function that picks examples by the method `name`. Raises UserError if the pool is empty or has fewer
    than `n` examples."""
    if not pool or n > len(pool):
        raise UserError(f"{max(n, 1)} shots, but only {len(pool)} training examples", "shots", "use fewer shots")
    return find(name).picker([(text(question), answer) for question, answer in pool], seed)


def text(question: Prompt) -> str:
    """The text of a question. In a chat, the question is the last turn."""
    return question if isinstance(question, str) else str(question[-1]["content"])


def put(prompt: Prompt, shots: Sequence[Shot]) -> Prompt:
    """Puts solved examples before the question of a prompt. In a chat, the examples become turns after the system
    message."""
    if isinstance(prompt, str):
        return "\n\n".join([*(f"{question}{answer}" for question, answer in shots), prompt])
    first = 1 if prompt[0]["role"] == "system" else 0
    before: list[dict] = []
    for question, answer in shots:
        before += [turn for turn in question if turn["role"] != "system"]
        before.append({"role": "assistant", "content": answer.strip()})
    return [*prompt[:first], *before, *prompt[first:]]


def most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number n up to `limit` for which `fits(n)` is true, or 0 if there is none. The search doubles n, then
    bisects."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
