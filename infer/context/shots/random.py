"""Draws examples at random, separately for each question."""

import random
from collections.abc import Sequence

from infer.context.shots import Picker


def picker(pool: Sequence[tuple[str, str]], seed: int) -> Picker:
    draw = lambda i, n: random.Random(f"{seed}/{i}").sample(range(len(pool)), n)
    return lambda questions, n: [draw(i, n) for i in range(len(questions))]
