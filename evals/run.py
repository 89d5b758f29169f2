"""Scores a model on a task: what it answers, how often that is right, and how sure the number is."""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from common import stats
from common.errors import UserError
from common.types import Json
from evals import task as tasks
from evals.task import Example, Prompt, Task
from infer.lm import LM
from model import weights
from model.config import in_layers
from model.weights import Spec, Weight

BATCH = 16  # prompts at once; no score depends on it


@dataclasses.dataclass(frozen=True)
class Result:
    """`score` is the sum over `n` examples; [low, high] holds the mean with 95 % confidence."""

    task: str
    n: int
    shots: int
    seed: int
    score: float
    low: float
    high: float
    normalised: float | None  # kind "choice": the mean when log-likelihoods are divided by the option's bytes
    prompt_tokens: float  # mean
    completion_tokens: float  # mean
    seconds: float  # compilation included
    flops: float  # forward, an estimate: see `flops_per_token`
    task_hash: str  # of the questions and of how they are scored: evals.task.fingerprint
    commonest: str  # the most frequent answer, without white space around it
    commonest_n: int  # how often it was given
    samples: list[dict]  # the first ones: prompt, answer, completion, score

    @property
    def mean(self) -> float:
        return self.score / self.n

    def to_dict(self) -> Json:
        return {"task": self.task, "mean": self.mean, **dataclasses.asdict(self)}


def evaluate(
    task: str | Task, lm: LM, n: int = 100, seed: int = 0, shots: int = 0, batch_size: int = BATCH, keep: int = 50
) -> Result:
    """Greedy answers, or the likeliest option, of `lm` (infer.lm.LM) on `n` held-out examples.

    `task` is a name or a Task. `keep` samples stay in the result.
    """
    name, task = (task, tasks.load(task)) if isinstance(task, str) else ("unnamed", task)
    drawn = tasks.draw(task, n, seed, shots)
    if not drawn:
        raise UserError("there are no held-out examples to score", name, "n is at least 1")
    examples = [example for example, _ in drawn]
    prompts = [task.prompt(example, shown) for example, shown in drawn]
    asked = [len(lm.encode(p)) for p in prompts]
    start, normalised, passes = time.perf_counter(), None, 1
    if task.kind == "choice":
        options = [e["options"] for e in examples]
        completions, per_byte = choose(lm, prompts, options)
        normalised = sum(map(task.score, examples, per_byte)) / len(examples)
        written = [sum(len(lm.tokenizer.encode(o)) for o in row) for row in options]
        passes = len(options[0])
    else:
        completions = answer(lm, prompts, task.max_new_tokens, batch_size)
        written = [len(lm.tokenizer.encode(c)) + 1 for c in completions]  # and the token that ends it
    scores = [float(task.score(e, c)) for e, c in zip(examples, completions, strict=True)]
    low, high = stats.of_scores(scores)
    [(commonest, often)] = Counter(c.strip() for c in completions).most_common(1)
    return Result(
        task=name, n=len(scores), shots=shots, seed=seed, score=sum(scores), low=low, high=high, normalised=normalised,
        prompt_tokens=float(np.mean(asked)),
        completion_tokens=float(np.mean(written)),
        seconds=time.perf_counter() - start,
        flops=flops_per_token(lm) * (passes * sum(asked) + sum(written)),
        task_hash=tasks.fingerprint(task),
        commonest=commonest,
        commonest_n=often,
        samples=[sample(*one) for one in zip(prompts, examples, completions, scores, strict=True)][:keep],
    )  # fmt: skip


def answer(lm: LM, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int) -> list[str]:
    """Greedy completions. Prompts of like lengths share a batch, and the last is filled up: few shapes are compiled."""
    order = sorted(range(len(prompts)), key=lambda i: len(lm.encode(prompts[i])))
    batch_size, texts = min(batch_size, len(prompts)), [""] * len(prompts)
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        filled = rows + rows[-1:] * (batch_size - len(rows))
        found = lm.generate([prompts[i] for i in filled], max_new_tokens=max_new_tokens)
        for i, text in zip(rows, found, strict=False):
            texts[i] = text
    return texts


def choose(lm: LM, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Of each row of options the one with the highest log-likelihood behind its prompt, and the highest per byte.

    The second does not prefer short options. The first of equals wins.
    """
    flat = [(p, o) for p, row in zip(prompts, options, strict=True) for o in row]
    logps = iter(lm.logps([p for p, _ in flat], [o for _, o in flat]))
    by_sum, by_byte = [], []
    for row in options:
        mine = [next(logps)[0] for _ in row]
        by_sum.append(row[int(np.argmax(mine))])
        by_byte.append(row[int(np.argmax([x / max(len(o.encode()), 1) for x, o in zip(mine, row, strict=True)]))])
    return by_sum, by_byte


def sample(prompt: Prompt, example: Example, completion: str, score: float) -> dict:
    """What a reader wants to see of one example: the question without its shots and instruction."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return {"prompt": question, "answer": example["answer"], "completion": completion, "score": score}


def flops_per_token(lm: LM) -> float:
    """2 FLOPs for each multiply-add of the equations (Kaplan et al. 2020), head included; attention is left out.

    Virtual tokens of prefix and prompt tuning are keys of attention, and so left out with its scores.
    """
    tied, found = lm.config.tied, []

    def count(path: str, w: Array | Weight, spec: Spec | None) -> None:
        if (spec and not spec.eqn) or (path.startswith("embed") and not tied):
            return
        stacked = spec.stacked if spec else in_layers(path)
        found.extend(jax.tree.leaves(w.macs(stacked) if weights.is_weight(w) else w.size))

    weights.replace(lm.params, lm.model.specs, count)
    return 2.0 * sum(found)
