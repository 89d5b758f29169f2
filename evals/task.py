"""A task: examples, a prompt for each, and a scorer, which also serves as a reward.

A file evals/tasks/<name>.py defines `task(**options) -> Task`; its name is the task's name. A file of rows is also a
task; see evals.rows.
"""

import contextlib
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
from evals import scorers

Example = Json  # "answer" and the fields that `prompt` reads; also "options" for a choice
Prompt = str | list[dict]  # a text to continue, or chat messages that end with a user's turn
TASKS = Path(__file__).parent / "tasks"


class Task(NamedTuple):
    """`examples(split)` returns all examples of "train" or "heldout", which are disjoint, always in the same order.

    `prompt(example, shots)` is the question after solved examples. `score(example, completion)` is a pure function; 1.0
    is right. Kind "choice": the completion is the most likely of `example["options"]`.
    """

    examples: Callable[[str], Sequence[Example]]
    prompt: Callable[[Example, Sequence[Example]], Prompt]
    score: Callable[[Example, str], float]
    kind: str = "generate"  # | "choice"
    max_new_tokens: int = 32  # 0: enough for the longest answer
    raw: Callable[[Example, Sequence[Example]], str] | None = None  # `prompt` for models without a chat template
    scorer: str = ""  # name in evals/scorers; "": the task's own
    notes: tuple[str, ...] = ()  # remarks about its rows, to print


def load(name: str, **options: Leaf) -> Task:
    """The task of a file in evals/tasks, or of a source with its options (evals.rows)."""
    known = sorted(p.stem for p in TASKS.glob("[!_]*.py"))
    if name in known:
        return importlib.import_module(f"evals.tasks.{name}").task(**options)
    from evals import rows

    if rows.is_source(name):
        return rows.task(name)
    fix = did_you_mean(name, known, f"known: {', '.join(known)}; or a file of rows")
    raise UserError(f"no task {name!r}", "evals/tasks", fix)


def named(specs: Sequence[str]) -> dict[str, Task]:
    """Tasks by the names of their results. Raises UserError if two have the same name."""
    from evals import rows

    found: dict[str, Task] = {}
    for spec in specs:
        task, name = load(spec), rows.name(spec)
        if name in found:
            raise UserError(f"two tasks have the name {name!r}", spec, "write FILE:name=ANOTHER")
        found[name] = task
    return found


def by(scorer: str) -> Callable[[Example, str], float]:
    """The `score` of a scorer by name: the best over an example's references."""
    score = scorers.find(scorer)
    return lambda example, answer: max(score(answer, r) for r in example.get("references", [example["answer"]]))


def draw(task: Task, n: int, seed: int, shots: int = 0) -> list[tuple[Example, list[Example]]]:
    """`n` held-out examples (all if there are fewer), each with its own `shots` from the training split.

    The examples do not depend on `n`: the first 10 of n=100 are those of n=10.
    """
    heldout, train = list(task.examples("heldout")), task.examples("train") if shots else ()
    if shots > len(train) and shots:
        raise UserError(f"{shots} shots, but only {len(train)} training examples", "shots", "use fewer shots")
    random.Random(seed).shuffle(heldout)
    return [(e, random.Random(f"{seed}/{i}").sample(train, shots)) for i, e in enumerate(heldout[:n])]


def identity(task: Task, example: Example) -> str:
    """12 hex digits that identify a question (without shots) and its answers."""
    known = [task.prompt(example, ()), example.get("references", example["answer"]), example.get("options")]
    return hashlib.blake2b(json.dumps(known, default=str).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def fingerprint(task: Task) -> str:
    """12 hex digits that identify the questions, answers and scorer: scores with equal digits are comparable."""
    parts: list = [task.kind, task.max_new_tokens, task.scorer and f"{task.scorer}/{scorers.VERSION}"]
    if not task.scorer:
        with contextlib.suppress(OSError, TypeError):  # defined interactively or not a function: there is no source
            parts.append(inspect.getsource(inspect.getmodule(task.score) or task.score))
    parts += [identity(task, example) for example in task.examples("heldout")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def chat(instruction: str, question: Callable[[Example], str]) -> Callable[[Example, Sequence[Example]], Prompt]:
    """A `prompt` with the instruction as system message and shots as earlier turns of the conversation."""

    def prompt(example: Example, shots: Sequence[Example] = ()) -> Prompt:
        turns = [{"role": "system", "content": instruction}]
        for shot in shots:
            turns += [_turn("user", question(shot)), _turn("assistant", shot["answer"])]
        return [*turns, _turn("user", question(example))]

    return prompt


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def records(task: Task, split: str) -> Iterator[dict]:
    """A split as training records: the question without shots, and the answer."""
    for example in task.examples(split):
        prompt, answer = task.prompt(example, ()), example["answer"]
        if isinstance(prompt, str):
            yield {"prompt": prompt, "completion": answer}
        else:
            yield {"messages": [*prompt, _turn("assistant", answer)]}
