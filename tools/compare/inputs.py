"""Reads the inputs of a comparison: the rows of the task, the models, and the tokens and FLOPs of a request."""

import json
import math
import operator
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import files
from common.errors import UserError
from common.types import Json, Leaf
from configs import schema
from data import sources
from evals import rows, task
from infer import hosted
from infer.context import Asker, Context
from infer.retrieve.search import How

if TYPE_CHECKING:
    from data.text.tokenizer import Tokenizer

LEAST = {"train": 20, "validation": 5, "test": 10}  # minimum number of rows in each split
SHARE, STEPS = 1024, 8  # maximum number of tokens per training step; minimum number of steps per epoch
BYTES, WINDOW = 4, 8000  # assumed for hosted models: bytes per token, and context length in tokens
CONFIG = "configs/sft/own_task.py"
TEST = ":split=test"  # without it, all rows of a file named "test.csv" would be test rows


class Task(NamedTuple):
    """The task of a comparison. `spec` is the name of the file, with options, and `scored[split]` are the rows of a
    split."""

    spec: str
    name: str
    scored: dict[str, list[Json]]
    test: task.Task

    def record(self) -> Json:
        source, _ = rows.parse(self.spec)
        twice = [note for note in self.test.notes if "duplicate" in note]
        return {
            "name": self.name, "source": source, "hash": task.fingerprint(self.test),
            "content": sources.content_id(source)[:16], "scorer": self.test.scorer,
            "rows": {split: len(found) for split, found in self.scored.items()},
            "notes": [note for note in self.test.notes if note not in twice], "duplicates": twice,
        }  # fmt: skip


def read(spec: str) -> Task:
    """Reads the task from a file. Raises UserError if there are too few rows, or if all have the same answer."""
    if not rows.is_source(spec):
        raise UserError(f"{spec!r} is not a file of rows", "--task", "give a .csv, .jsonl, .json or .parquet file")
    _, options = rows.parse(spec)
    if "split" in options or "name" in options:
        raise UserError("a comparison sets the split and the name itself", spec, "leave out split= and name=")
    found = rows.task(f"{spec}{TEST}")
    scored = {name: list(found.examples("heldout" if name == "test" else name)) for name in LEAST}
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in scored.items())
    if short := [name for name, least in LEAST.items() if len(scored[name]) < least]:
        least = LEAST[short[0]]
        what = f"too few rows to compare methods ({sizes}): the {short[0]} split needs {least} or more"
        raise UserError(what, spec, "use 200 rows or more, 1,000 to detect a difference of 5 points")
    answers = {row["answer"] for part in scored.values() for row in part}
    if len(answers) == 1:
        raise UserError(f"every row has the answer {min(answers)[:40]!r}, so methods cannot be compared", spec)
    return Task(spec, rows.name(spec), scored, found)


class Base(NamedTuple):
    """A model, and how many tokens the task's rows have with its tokenizer."""

    name: str
    context: int  # maximum number of tokens in a prompt plus its answer
    forward: float  # FLOPs per token of a forward pass
    prompt: float  # mean number of tokens in a question
    answer: float  # mean number of tokens in an answer, including the end token
    longest: int  # largest number of tokens in a question plus its answer
    hosted: bool = False
    usd: tuple[float, float] | None = None  # of a hosted model: dollars per million prompt and answer tokens


class Comparison(NamedTuple):
    """The inputs of a comparison, which are passed to its methods."""

    task: Task
    bases: dict[str, Base]
    documents: str | None
    epochs: float
    out: Path
    embedder: str = ""  # the model that embeds the documents; without one, passages are found by their words (BM25)

    @property
    def searches(self) -> tuple[How | None, ...]:
        """The search methods to try, starting with the best guess."""
        return ("mean", "bm25", "dense") if self.embedder else (None,)

    def room(self, model: str, each: float) -> int:
        """Returns how many texts of `each` tokens fit into a model's context in addition to the longest question and
        its answer."""
        base = self.bases[model]
        return int(max(0.0, (base.context - base.longest - 32) // max(each, 1.0)))


def base(model: str, rows_of: Task) -> Base:
    """Returns a model with its token counts. Raises UserError if the model cannot be opened, or if a row does not fit
    into its context."""
    if hosted.is_hosted(model):
        return _hosted(model, rows_of)
    from data.text import formats
    from infer.models import open_model
    from train import plan

    tokenizer = formats.load(open_model(model).tokenizer_source)
    chats = tokenizer.chat_template is not None
    if not chats and rows_of.test.raw is None:
        raise UserError("the rows are chats, but the model has no chat template", model)
    asked, answered = [], []
    for row in (row for part in rows_of.scored.values() for row in part):
        asked.append(_tokens(row["prompt"], tokenizer))
        answered.append(len(tokenizer.encode(row["answer"])) + 1)
    context = open_model(model).config.context
    longest = max(a + b for a, b in zip(asked, answered, strict=True))
    if longest > context:
        what = f"a row has {longest:,} tokens, but the model's context only {context:,}"
        raise UserError(what, rows_of.spec, "shorten the rows, or choose another model")
    cfg = config({"init": model, "peft.name": "", **shape(longest, 0, context)})
    forward = plan.describe(cfg, plan.blueprint(cfg))["flops_forward_per_token"]
    mean = lambda values: sum(values) / len(values)
    return Base(model, context, forward, mean(asked), mean(answered), longest)


def _hosted(model: str, rows_of: Task) -> Base:
    """Returns a hosted model, which needs no FLOPs on this machine. Its tokenizer is unknown, so token counts are
    estimated."""
    usd = hosted.parse(model).usd
    every = [row for part in rows_of.scored.values() for row in part]
    size = lambda text: len(json.dumps(text).encode()) / BYTES
    asked, answered = [size(row["prompt"]) for row in every], [size(row["answer"]) + 1 for row in every]
    longest = math.ceil(max(map(operator.add, asked, answered)))
    return Base(model, WINDOW, 0.0, sum(asked) / len(asked), sum(answered) / len(answered), longest, True, usd)


def config(changes: dict[str, Leaf]) -> schema.Config:
    """Returns the config of a training run. If `changes` sets no data source, because its file may not be written yet,
    the config has another source instead."""
    changes = {"data.source": "pydocs", "data.eval_source": "", **changes}
    return schema.resolve(schema.read(str(schema.overrides.CHECKOUT / CONFIG)), changes, [], CONFIG)[0]


def shape(longest: float, total: float, context: int) -> dict[str, Leaf]:
    """Returns the row length and batch size for training on examples of at most `longest` tokens, which fit into the
    model's context. If possible, a step has at most SHARE tokens, and an epoch of `total` tokens has at least STEPS
    steps."""
    length = min(context, max(64, math.ceil(longest / 64) * 64))
    rows = min(SHARE // length, int(total / length / STEPS))
    return {"data.seq_len": length, "data.batch_size": max(1, rows)}


def order(found: list[Json]) -> list[Json]:
    """Returns the rows in a random order that is always the same. Subsets are taken from the beginning, so a larger
    subset contains every smaller one."""
    shuffled = list(found)
    random.Random(0).shuffle(shuffled)
    return shuffled


def write(path: Path, found: list[Json], context: Context) -> None:
    """Writes rows as training data. Their prompts are the same as at inference, for example with passages before each
    question."""
    prompts = Asker(context)([row["prompt"] for row in found]).prompts
    files.write_lines(path, [_pair(prompt, row["answer"]) for prompt, row in zip(prompts, found, strict=True)])


def tokens(path: Path, model: str) -> list[int]:
    """Returns the number of tokens in each row of a training data file."""
    from data.text import formats
    from infer.models import open_model

    tokenizer = formats.load(open_model(model).tokenizer_source)
    pairs = (
        (row["prompt"], row["completion"])
        if "prompt" in row
        else (row["messages"][:-1], row["messages"][-1]["content"])
        for row in files.read_lines(path)
    )
    return [_tokens(prompt, tokenizer) + len(tokenizer.encode(answer)) + 1 for prompt, answer in pairs]


def _tokens(prompt: str | list[dict], tokenizer: "Tokenizer") -> int:
    """Returns the number of tokens in a question. It is formatted as a chat if the model has a chat template."""
    from data.examples import Completion, wrapped
    from data.text import chat

    if tokenizer.chat_template is None:
        return len(tokenizer.encode(prompt)) if isinstance(prompt, str) else 0
    turns = prompt if isinstance(prompt, list) else wrapped(Completion(prompt, "-")).messages[:-1]
    return len(chat.encode(turns, tokenizer))


def _pair(prompt: str | list[dict], answer: str) -> Json:
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": answer}
    return {"messages": [*prompt, {"role": "assistant", "content": answer}]}
