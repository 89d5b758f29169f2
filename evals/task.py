"""A task: examples, a prompt for each, and a scorer, which also serves as a reward.

A file evals/tasks/<name>.py defines `task(**options) -> Task`; its name is the task's name. A file of rows is also a
task; see evals.rows.
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

Example = Json  # "answer" and the fields that `prompt` reads; also "options" for a choice
Prompt = str | list[dict]  # a text to continue, or chat messages that end with a user's turn
TASKS = Path(__file__).parent / "tasks"


class Task(NamedTuple):
    """`examples(split)` returns all examples of "train", "validation" or "heldout". The splits are disjoint, and their
    order never changes. A file in evals/tasks needs no "validation" split, since `load` takes one from its "train"
    split.

    `prompt(example)` is the question. `score(example, completion)` is a pure function; 1.0 is right. For the kind
    "choice", the completion is the most likely of `example["options"]`.
    """

    examples: Callable[[str], Sequence[Example]]
    prompt: Callable[[Example], Prompt]
    score: Callable[[Example, str], float]
    kind: str = "generate"  # | "choice"
    max_new_tokens: int = 32  # 0: enough for the longest answer
    raw: Callable[[Example], str] | None = None  # `prompt` for models without a chat template
    scorer: str = ""  # name in evals/scorers; "": the task's own
    notes: tuple[str, ...] = ()  # remarks about its rows, to print


def load(name: str, **options: Leaf) -> Task:
    """The task of a file in evals/tasks, or of a source with its options (evals.rows)."""
    known = sorted(p.stem for p in TASKS.glob("[!_]*.py"))
    if name in known:
        return _validated(importlib.import_module(f"evals.tasks.{name}").task(**options))
    from evals import rows

    if rows.is_source(name):
        return rows.task(name)
    fix = did_you_mean(name, known, f"known: {', '.join(known)}; or a file of rows")
    raise UserError(f"no task {name!r}", "evals/tasks", fix)


def _validated(task: Task) -> Task:
    """The task with a part of its training examples as "validation", chosen by their questions."""

    @functools.cache
    def examples(split: str) -> Sequence[Example]:
        if split == "heldout":
            return task.examples(split)
        share = splits.VALIDATION / (1 - splits.TEST) * 2**64
        side = lambda e: "validation" if splits.key(json.dumps(task.prompt(e))) < share else "train"
        return [e for e in task.examples("train") if side(e) == split]

    return task._replace(examples=examples)


def named(specs: Sequence[str]) -> dict[str, Task]:
    """{name of the results: task}. Raises UserError if two have the same name."""
    from evals import rows

    found: dict[str, Task] = {}
    for spec in specs:
        task, name = load(spec), rows.name(spec)
        if name in found:
            raise UserError(f"two tasks have the name {name!r}", spec, "write FILE:name=ANOTHER")
        found[name] = task
    return found


def by(scorer: str) -> Callable[[Example, str], float]:
    """The `score` function of a named scorer: the best score over an example's references."""
    score = scorers.find(scorer)
    return lambda example, answer: max(score(answer, r) for r in example.get("references", [example["answer"]]))


def draw(task: Task, n: int, seed: int, split: str = "heldout") -> list[Example]:
    """`n` examples of a split (all if there are fewer). The first 10 examples for n=100 are those for n=10."""
    found = list(task.examples(split))
    random.Random(seed).shuffle(found)
    return found[:n]


def identity(task: Task, example: Example) -> str:
    """12 hex digits that identify a question and its answers."""
    known = [task.prompt(example), example.get("references", example["answer"]), example.get("options")]
    return hashlib.blake2b(json.dumps(known, default=str).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def fingerprint(task: Task) -> str:
    """12 hex digits that identify the questions, answers and scorer: scores with the same fingerprint are
    comparable."""
    parts: list = [task.kind, task.max_new_tokens, task.scorer and f"{task.scorer}/{scorers.VERSION}"]
    if not task.scorer:
        with contextlib.suppress(OSError, TypeError):  # defined interactively, or not a function: it has no source code
            parts.append(inspect.getsource(inspect.getmodule(task.score) or task.score))
    parts += [identity(task, example) for example in task.examples("heldout")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def chat(instruction: str, question: Callable[[Example], str]) -> Callable[[Example], Prompt]:
    """A `prompt` with the instruction as system message."""
    return lambda example: [_turn("system", instruction), _turn("user", question(example))]


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def records(task: Task, split: str) -> Iterator[dict]:
    """A split as training records: the question and the answer."""
    for example in task.examples(split):
        prompt, answer = task.prompt(example), example["answer"]
        if isinstance(prompt, str):
            yield {"prompt": prompt, "completion": answer}
        else:
            yield {"messages": [*prompt, _turn("assistant", answer)]}
