"""A prompting setup adds an instruction, solved examples, retrieved passages, or a combination of these to a question.

instruction.py   Adds a system message.
shots/           Adds solved examples, with one file per method of picking them: random, fixed, diverse, nearest.
retrieval.py     Adds passages from an index of documents.

A prompt consists of the system message, the examples, the passages and the question, in this order. This puts the parts
that all questions share first, so that they are computed only once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.errors import UserError
from common.types import Json
from infer.context import instruction, retrieval, shots
from infer.context.shots import Prompt, Shot
from infer.retrieve.index import Hit, opened
from infer.retrieve.search import How

FULL = -1  # stands for as many examples as fit into the model's context window


@dataclasses.dataclass(frozen=True)
class Context:
    """A prompting setup. The default is zero-shot prompting. `to_dict` returns the values that differ from the
    defaults, and `Context(**values)` restores the setup from these values."""

    instruction: str = ""  # the system message; "{}" stands for the question's own system message
    shots: int = 0  # number of examples per question, or FULL
    pick: str = "random"  # method of picking examples, a file in infer/context/shots
    index: str = ""  # folder of an index (tools.index)
    k: int = 3  # chunks per question
    how: How | None = None  # search method; None: the default of the index
    cite: bool = False  # whether an answer should cite the chunks on which it is based

    def __post_init__(self) -> None:
        if self.shots:
            shots.find(self.pick)
        if self.cite and not self.index:
            raise UserError("answers can cite only passages", "--cite", "name an index of documents: --index=DIR")

    def to_dict(self) -> Json:
        used = {"pick": self.shots, "k": self.index, "how": self.index}
        values = {field: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {f.name: v for f, v in values.items() if v != f.default and used.get(f.name, True)}

    @property
    def label(self) -> str:
        """Describes the setup in words, such as "zero-shot" or "4-shot nearest, 3 passages"."""
        parts = [f"instruction {_short(self.instruction)}"] if self.instruction else []
        if self.shots:
            many = "many-shot" if self.shots == FULL else f"{self.shots}-shot"
            parts.append(many if self.pick == "random" else f"{many} {self.pick}")
        if self.index:
            parts.append(f"{self.k} passage{'s' * (self.k > 1)}{' cited' * self.cite}")
        return ", ".join(parts) or "zero-shot"


class Prompts(NamedTuple):
    prompts: list[Prompt]
    shots: int  # examples in each prompt
    hits: list[list[Hit]]  # the chunks in each prompt, best first; empty if no index is used
    flops: float  # FLOPs of the search


class Asker:
    """Applies a prompting setup to questions. `pool` contains the solved examples to pick from, and must not contain
    test questions."""

    def __init__(self, context: Context, pool: Sequence[Shot] = (), seed: int = 0):
        self.context, self.pool = context, pool
        self.index = opened(context.index) if context.index else None
        self.picked = shots.picker(context.pick, pool, context.shots, seed) if context.shots else None

    def __call__(self, questions: Sequence[Prompt], fits: Callable[[list[Prompt]], bool] | None = None) -> Prompts:
        """Makes the prompts for questions. `fits` returns whether prompts fit into the model's context window; it is
        needed only if the number of examples is FULL."""
        hits = retrieval.found(self.index, questions, self.context.k, self.context.how) if self.index else []
        asked = (
            [retrieval.put(q, h, self.context.cite) for q, h in zip(questions, hits, strict=True)]
            if hits
            else list(questions)
        )
        ask = functools.partial(self._ask, questions, asked)
        n = self.context.shots
        if n == FULL and not fits:
            raise UserError("the model's context window is unknown, so it cannot be filled", "shots", "give a number")
        if n == FULL and fits:
            n = shots.most(lambda n: fits(ask(n)), len(self.pool))
        return Prompts(ask(n), n, hits, self.index.flops(map(shots.text, questions), self.context.how) if hits else 0.0)

    def _ask(self, questions: Sequence[Prompt], asked: Sequence[Prompt], n: int) -> list[Prompt]:
        chosen = self.picked([shots.text(q) for q in questions], n) if self.picked and n else [[]] * len(asked)
        whole = (shots.put(prompt, [self.pool[i] for i in row]) for prompt, row in zip(asked, chosen, strict=True))
        return [instruction.put(prompt, self.context.instruction) for prompt in whole]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
