"""Defines a method of a comparison by how it trains and how it prompts. Each method is a file in tools/compare/methods.

The file methods/NAME.py defines the function `method(comparison, model) -> Method`, and NAME is the method's name.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from common.types import Json, Leaf
from infer.context import Context
from tools.compare.inputs import Comparison

PASSAGE = 220  # estimated tokens of a passage of infer.retrieve.chunks.WORDS words


class Setting(NamedTuple):
    """A candidate setting of a method."""

    values: dict[str, Leaf]  # the values that the page shows, such as {"lr": 1e-3}
    train: dict[str, Leaf] | None = None  # overrides of configs/sft/own_task.py, or None if nothing is trained
    ask: Context = Context()  # prompting setup, in training and in inference


class Method(NamedTuple):
    """A method for one model. `settings` are its candidates, the best guess first. `refused` says why the method cannot
    be used, in which case there are no settings."""

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
        """Returns the entry of the candidate in the record."""
        label = ", ".join([self.method.label, *(f"{k} {v}" for k, v in self.setting.values.items())])
        return {
            "id": self.id, "method": self.name, "model": self.model, "label": label, "settings": self.setting.values,
            "rungs": [],
        }  # fmt: skip


def trained(c: Comparison, model: str, label: str, how: str, settings: Iterable[Setting]) -> Method:
    """Makes a method that trains. The method is refused for a hosted model, which cannot be trained."""
    if c.bases[model].hosted:
        return Method(label, how, refused="the weights of a hosted model are not here")
    return Method(label, how, tuple(settings))


def reading(c: Comparison, model: str, label: str, how: str, fits: Callable[[int], list[Setting]]) -> Method:
    """Makes a method that reads retrieved passages. `fits(n)` returns the settings with at most n passages per
    question."""
    room = c.room(model, PASSAGE)
    if not c.documents:
        return Method(label, how, refused="no documents were given: --documents=SOURCE")
    if not (settings := fits(room)):
        return Method(label, how, refused="no passage fits into the context of the model")
    return Method(label, how, tuple(settings), documents=True)
