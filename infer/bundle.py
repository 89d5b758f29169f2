"""Loads a bundle: a folder in which tools.compare saves everything that the winning method needs.

BUNDLE/bundle.json     The model's name, the adapter, and the prompting setup (infer.context.Context); written last.
BUNDLE/model/          The tuned model, if it is stored with full or merged weights.
BUNDLE/adapter/        The adapter, if it is stored separately from its base model.
BUNDLE/examples.jsonl  The solved examples to pick from, if prompts show examples.
BUNDLE/index/          The index of documents, if prompts contain passages.
"""

import dataclasses
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError, reading
from data.examples import Completion, wrapped
from infer.context import Asker, Context
from infer.lm import LM, Prompt

NAME, EXAMPLES, FORMAT = "bundle.json", "examples.jsonl", 1


@dataclasses.dataclass(frozen=True, eq=False)
class Bundled(LM):
    """A model that applies its bundle's prompting setup, such as solved examples and passages, to every question. If
    the model has a chat template, the setup is applied only to chats; plain texts are continued as they are."""

    asker: Asker = dataclasses.field(default_factory=lambda: Asker(Context()))

    def encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) == (self.tokenizer.chat_template is None):
            [prompt] = self.asker([prompt if isinstance(prompt, str) else list(prompt)]).prompts
        return super().encode(prompt)


def is_bundle(name: str | Path) -> bool:
    return (Path(name).expanduser() / NAME).is_file()


def load(name: str | Path, **options: Any) -> Bundled:
    """Loads the model in a bundle. `options` are passed to infer.models.load. Raises UserError if the bundle is
    damaged."""
    from infer import models

    folder = Path(name).expanduser()
    record = files.load_json(folder / NAME)
    with reading(folder / NAME, "write it again with tools.compare"):
        if record["format"] != FORMAT:
            raise UserError("the bundle was written by a different version", str(name))
        inside = lambda part: str(folder / part) if part in ("model", "adapter", "index") else part
        context = record["context"]
        context = Context(**context | ({"index": inside(context["index"])} if "index" in context else {}))
        shown = [(row["prompt"], row["answer"]) for row in files.read_lines(folder / EXAMPLES)]
        model, adapter, seed = inside(record["model"]), inside(record["adapter"]) or None, record["seed"]
    lm = models.load(model, adapter=adapter, **options)
    raw = lm.tokenizer.chat_template is None
    pool = shown if raw else [(_turns(prompt), answer) for prompt, answer in shown]
    fields = {field.name: getattr(lm, field.name) for field in dataclasses.fields(lm)}
    return Bundled(**fields, asker=Asker(context, pool, seed))


def _turns(prompt: str | list[dict]) -> list[dict]:
    """Converts a question to chat messages in the format that training uses."""
    return wrapped(Completion(prompt, "-")).messages[:-1] if isinstance(prompt, str) else prompt


def part(trained: Any) -> str:
    """The name of a bundle's subfolder for trained weights: "adapter", or "model" for full or merged weights. Returns
    "" if nothing was trained."""
    if trained is None:
        return ""
    return "adapter" if trained.get("peft.name") and not trained.get("quant.name") else "model"
