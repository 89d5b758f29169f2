"""A method of a comparison: how to train, and how to prompt. Each method is a file in tools/compare/methods.

A file methods/NAME.py defines `method(comparison, model) -> Method`; NAME is the method's name.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from common.types import Json, Leaf
from infer.context import Context
from tools.compare.inputs import Comparison

PASSAGE = 220  # tokens of a passage (infer.retrieve.chunks.WORDS)


class Setting(NamedTuple):
    """One candidate of a method."""

    values: dict[str, Leaf]  # the choice, as the page shows it: {"lr": 1e-3}
    train: dict[str, Leaf] | None = None  # overrides of configs/sft/own_task.py; None: no training
    ask: Context = Context()  # prompting setup, also for the questions of the training rows


class Method(NamedTuple):
    """`settings`: the candidates, the best guess first. `refused` is a sentence why the method cannot be used; it then
    has no settings."""

    label: str
    how: str  # one sentence
    settings: tuple[Setting, ...] = ()
    documents: bool = False  # reads documents for every request
    refused: str = ""


class Candidate(NamedTuple):
    id: str
    name: str  # of the method
    model: str
    method: Method
    setting: Setting

    @property
    def trained(self) -> bool:
        return self.setting.train is not None

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.model

    def row(self) -> Json:
        """The candidate in the record."""
        label = ", ".join([self.method.label, *(f"{k} {v}" for k, v in self.setting.values.items())])
        return {
            "id": self.id, "method": self.name, "model": self.model, "label": label, "settings": self.setting.values,
            "rungs": [],
        }  # fmt: skip


def trained(c: Comparison, model: str, label: str, how: str, settings: Iterable[Setting]) -> Method:
    """A method that trains; a hosted model cannot be trained."""
    if c.bases[model].hosted:
        return Method(label, how, refused="the weights of a hosted model are not here")
    return Method(label, how, tuple(settings))


def reading(c: Comparison, model: str, label: str, how: str, fits: Callable[[int], list[Setting]]) -> Method:
    """A method that reads retrieved passages; `fits(n)` returns the settings with at most n passages per question."""
    room = c.room(model, PASSAGE)
    if not c.documents:
        return Method(label, how, refused="no documents were given: --documents=SOURCE")
    if not (settings := fits(room)):
        return Method(label, how, refused="no passage fits into the context of the model")
    return Method(label, how, tuple(settings), documents=True)
