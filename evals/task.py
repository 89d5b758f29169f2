"""A task consists of examples, a prompt for each example, and a scorer, which can also serve as a reward.

A file evals/tasks/<name>.py defines `task(**options) -> Task`, and the file's name is the task's name. A data file with
questions and answers can also be a task; see evals.rows.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, did_you_mean
from common.types import Json, Leaf
from data import splits
from evals import scorers

Example = Json  # has "answer" and the fields that `prompt` reads; if the task's kind is "choice", also "options"
Prompt = str | list[dict]  # a text to continue, or chat messages that end with a user's turn
TASKS = Path(__file__).parent / "tasks"


class Task(NamedTuple):
    """`examples(split)` returns all examples of the split "train", "validation" or "heldout". The splits are disjoint,
    and the order of their examples never changes. A file in evals/tasks needs no "validation" split, because `load`
    splits one off its "train" split.

    `prompt(example)` returns the question. `score(example, completion)` is a pure function that returns 1.0 if the
    completion is right. For the kind "choice", the completion is the option in `example["options"]` that the model
    finds most likely.
    """

    examples: Callable[[str], Sequence[Example]]
    prompt: Callable[[Example], Prompt]
    score: Callable[[Example, str], float]
    kind: str = "generate"  # | "choice"
    max_new_tokens: int = 32  # 0 means enough for the longest reference
    raw: Callable[[Example], str] | None = None  # `prompt` for models without a chat template
    scorer: str = ""  # name in evals/scorers; "" if the task has its own scorer
    notes: tuple[str, ...] = ()  # remarks about the task's rows, to be printed


def load(name: str, **options: Leaf) -> Task:
    """Loads the task that a file in evals/tasks defines, or makes a task from a data source with its options
    (evals.rows)."""
    known = sorted(p.stem for p in TASKS.glob("[!_]*.py"))
    if name in known:
        return _validated(importlib.import_module(f"evals.tasks.{name}").task(**options))
    from evals import rows

    if rows.is_source(name):
        return rows.task(name)
    fix = did_you_mean(name, known, f"known: {', '.join(known)}; or name a data file")
    raise UserError(f"no task {name!r}", "evals/tasks", fix)


def _validated(task: Task) -> Task:
    """Returns the task with an additional split "validation". It consists of training examples that are chosen by a
    hash of their questions and removed from the training split."""

    @functools.cache
    def examples(split: str) -> Sequence[Example]:
        if split == "heldout":
            return task.examples(split)
        share = splits.VALIDATION / (1 - splits.TEST) * 2**64
        side = lambda e: "validation" if splits.key(json.dumps(task.prompt(e))) < share else "train"
        return [e for e in task.examples("train") if side(e) == split]

    return task._replace(examples=examples)


def named(specs: Sequence[str]) -> dict[str, Task]:
    """Loads tasks, and returns {name under which the results are recorded: task}. Raises UserError if two tasks have
    the same name."""
    from evals import rows

    found: dict[str, Task] = {}
    for spec in specs:
        task, name = load(spec), rows.name(spec)
        if name in found:
            raise UserError(f"two tasks have the name {name!r}", spec, "write FILE:name=ANOTHER")
        found[name] = task
    return found


def by(scorer: str) -> Callable[[Example, str], float]:
    """Returns a `score` function for a Task, which uses the named scorer. Its score is the best one over an example's
    references."""
    score = scorers.find(scorer)
    return lambda example, answer: max(score(answer, r) for r in example.get("references", [example["answer"]]))


def draw(task: Task, n: int, seed: int, split: str = "heldout") -> list[Example]:
    """Draws `n` examples of a split, or all of them if there are fewer. With the same seed, the examples for n=10 are
    the first 10 of the examples for n=100."""
    found = list(task.examples(split))
    random.Random(seed).shuffle(found)
    return found[:n]


def identity(task: Task, example: Example) -> str:
    """12 hex digits that identify a question and its answers."""
    known = [task.prompt(example), example.get("references", example["answer"]), example.get("options")]
    return hashlib.blake2b(json.dumps(known, default=str).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def fingerprint(task: Task) -> str:
    """12 hex digits that identify the questions, the answers and the scorer of a task. Scores with the same fingerprint
    are comparable."""
    parts: list = [task.kind, task.max_new_tokens, task.scorer and f"{task.scorer}/{scorers.VERSION}"]
    if not task.scorer:
        with contextlib.suppress(OSError, TypeError):  # raised for scorers without source code
            parts.append(inspect.getsource(inspect.getmodule(task.score) or task.score))
    parts += [identity(task, example) for example in task.examples("heldout")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def chat(instruction: str, question: Callable[[Example], str]) -> Callable[[Example], Prompt]:
    """Returns a `prompt` function for a Task. Its prompts are chats with `instruction` as the system message and
    `question(example)` as the user's message."""
    return lambda example: [_turn("system", instruction), _turn("user", question(example))]


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def records(task: Task, split: str) -> Iterator[dict]:
    """Yields the examples of a split as training records, each with a question and its answer."""
    for example in task.examples(split):
        prompt, answer = task.prompt(example), example["answer"]
        if isinstance(prompt, str):
            yield {"prompt": prompt, "completion": answer}
        else:
            yield {"messages": [*prompt, _turn("assistant", answer)]}
