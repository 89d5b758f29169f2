"""Defines the methods of a comparison. A method says how to train a model and how to prompt it.

Each method is a file in tools/compare/methods. The file NAME.py defines the function
`method(comparison, model) -> Method`, and NAME is the method's name.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from common.types import Json, Leaf
from infer.context import Context
from tools.compare.inputs import Comparison

PASSAGE = 220  # estimated number of tokens in a passage, which has infer.retrieve.chunks.WORDS words


class Setting(NamedTuple):
    """One setting of a method, such as a learning rate."""

    values: dict[str, Leaf]  # the values that the page shows, such as {"lr": 1e-3}
    train: dict[str, Leaf] | None = None  # overrides of configs/sft/own_task.py, or None if nothing is trained
    ask: Context = Context()  # how prompts are built, in training and at inference


class Method(NamedTuple):
    """A method for one model. `settings` are its candidates, starting with the best guess. A method that cannot be used
    has no settings, and `refused` gives the reason."""

    label: str
    how: str  # one sentence
    settings: tuple[Setting, ...] = ()
    documents: bool = False  # whether passages of the documents are retrieved for every request
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
        """Returns the candidate's entry in the record."""
        label = ", ".join([self.method.label, *(f"{k} {v}" for k, v in self.setting.values.items())])
        return {
            "id": self.id, "method": self.name, "model": self.model, "label": label, "settings": self.setting.values,
            "rungs": [],
        }  # fmt: skip


def trained(c: Comparison, model: str, label: str, how: str, settings: Iterable[Setting]) -> Method:
    """Makes a method that trains the model. The method is refused for a hosted model, which cannot be trained."""
    if c.bases[model].hosted:
        return Method(label, how, refused="the weights of a hosted model are not on this machine")
    return Method(label, how, tuple(settings))


def reading(c: Comparison, model: str, label: str, how: str, fits: Callable[[int], list[Setting]]) -> Method:
    """Makes a method whose prompts contain retrieved passages. `fits(n)` returns the settings with at most n passages
    per question."""
    room = c.room(model, PASSAGE)
    if not c.documents:
        return Method(label, how, refused="no documents were given: --documents=SOURCE")
    if not (settings := fits(room)):
        return Method(label, how, refused="not even one passage fits into the model's context")
    return Method(label, how, tuple(settings), documents=True)
