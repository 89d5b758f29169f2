"""Scores a model on a task: collects the model's answers, and computes their score and its confidence interval."""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from common import stats
from common.errors import UserError
from common.types import Json
from evals import latency, support
from evals import task as tasks
from evals.task import Example, Prompt, Task
from infer.context import Asker, Context, Prompts, retrieval
from infer.context.shots import text
from infer.hosted import Hosted
from infer.lm import LM
from infer.retrieve.index import Hit
from model import weights
from model.config import in_layers
from model.net.transformer import virtual_tokens
from model.weights import Spec, Weight

BATCH = 16  # prompts per batch; the scores do not depend on this number
LEAST, MOST = 32, 512  # minimum and maximum number of new tokens if the task does not limit them
CITATION = 12  # number of additional tokens that an answer may use for citations
FREQUENT = 5  # a result lists this many of the most frequent answers
ZERO_SHOT = Context()


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a model on a task. `score` is the sum of the scores of all `n` examples; [low, high] is the 95 %
    confidence interval of their mean."""

    task: str
    n: int
    split: str  # "heldout", or "validation"
    asked: str  # a label of the prompting setup, such as "zero-shot" or "4-shot nearest, 3 passages"
    context: Json  # infer.context.Context.to_dict
    shots: int  # number of solved examples in each prompt
    seed: int
    score: float
    low: float
    high: float
    by_sum: float | None  # for "choice": the mean score if options are ranked by total log-likelihood
    prompt_tokens: float | None  # mean per prompt; None if a hosted model does not report it
    completion_tokens: float | None  # mean
    seconds: float  # including compilation
    flops: float | None  # FLOPs of the forward passes; a prefix shared by several prompts counts once
    usd: float | None  # price of the tokens in dollars; None if the model is not hosted or has no price
    answers: list[tuple[str, int]]  # the most frequent completions, with their counts
    slices: dict[str, dict]  # {"COLUMN=VALUE": n, mean, low and high of the rows with this value}
    scorer: str  # name in evals/scorers; "" if the task has its own scorer
    support: Json | None  # the result of evals.support.measure; None if no passages were retrieved
    task_hash: str  # a hash of all held-out questions, their answers and the scorer (evals.task.fingerprint)
    rows: list[str]  # a hash of each example (evals.task.identity)
    scores: list[float]  # one per example
    samples: list[dict]  # the first examples: prompt, answer, completion, score
    latency: Json | None  # seconds per request, one at a time: p50, p95, n; None if not measured

    @property
    def mean(self) -> float:
        return self.score / self.n

    def to_dict(self) -> Json:
        return {"task": self.task, "mean": self.mean, **dataclasses.asdict(self)}


class Asked(NamedTuple):
    """A model's completions and their cost. `prompt_tokens` is the mean per prompt, and `completion_tokens` the mean
    per answer. Unknown numbers are None."""

    completions: list[str]
    prompt_tokens: float | None
    completion_tokens: float | None
    flops: float | None = None
    usd: float | None = None
    by_sum: float | None = None


def evaluate(
    task: str | Task, lm: LM | Hosted, n: int = 100, seed: int = 0, context: Context = ZERO_SHOT,
    batch_size: int = BATCH, keep: int = 50, name: str = "unnamed", split: str = "heldout", timed: int = 0,
) -> Result:  # fmt: skip
    """Scores `lm` on `n` examples of a split. For a task of the kind "choice", the answer is the option with the
    highest log-likelihood per byte. For any other task, the answer is generated greedily.

    `task` is either a name that evals.task.load accepts, or a Task, whose result is then recorded under `name`.
    `context` is the prompting setup, whose solved examples come from the training split. The first `keep` examples are
    stored in the result's `samples`. Its `seconds` include the time for retrieval. If `timed` is not 0, that many
    examples are then asked one at a time to measure the latency.
    """
    if isinstance(task, str):
        [(name, task)] = tasks.named([task]).items()
    examples = tasks.draw(task, n, seed, split)
    if not examples:
        raise UserError(f"there are no {split} examples to score", name, "n must be at least 1")
    if context.cite and task.kind == "choice":
        raise UserError("a choice among options cannot cite passages", name, "leave out --cite")
    raw = not isinstance(lm, Hosted) and lm.tokenizer.chat_template is None
    ask = task.raw if task.raw and raw else task.prompt
    pool = [(ask(e), e["answer"]) for e in task.examples("train")] if context.shots else []
    asker = Asker(context, pool, seed)

    def answered(some: Sequence[Example]) -> tuple[Prompts, Asked]:
        sizes = None if isinstance(lm, Hosted) else Sizes(task, lm, name, some, CITATION * context.cite)
        found = asker([ask(e) for e in some], sizes and sizes.fit)
        if isinstance(lm, Hosted):
            return found, _ask_hosted(task, lm, name, some, found.prompts)
        return found, _ask(task, lm, sizes, some, found.prompts, batch_size)

    start = time.perf_counter()
    found, asked = answered(examples)
    seconds, one = time.perf_counter() - start, lambda i: answered(examples[i : i + 1])
    answers, cited = asked.completions, [[] for _ in examples]
    if context.cite:
        answers, cited = zip(*map(retrieval.citations, answers, found.hits), strict=True)
    scores = [float(task.score(e, a)) for e, a in zip(examples, answers, strict=True)]
    low, high = stats.of_scores(scores)
    rows = zip(examples, asked.completions, scores, found.hits or [()] * len(scores), cited, strict=True)
    return Result(
        task=name, n=len(scores), split=split, seed=seed, score=sum(scores), low=low, high=high, by_sum=asked.by_sum,
        asked=dataclasses.replace(context, shots=found.shots).label, context=context.to_dict(), shots=found.shots,
        prompt_tokens=asked.prompt_tokens,
        completion_tokens=asked.completion_tokens,
        seconds=seconds,
        flops=None if asked.flops is None else asked.flops + found.flops,
        usd=asked.usd,
        answers=Counter(a.strip() for a in answers).most_common(FREQUENT),
        slices=_slices(examples, scores),
        scorer=task.scorer,
        support=support.measure(examples, answers, found.hits, cited) if found.hits else None,
        task_hash=tasks.fingerprint(task),
        rows=[tasks.identity(task, e) for e in examples],
        scores=scores,
        samples=[sample(ask(e), e, *row) for e, *row in rows][:keep],
        latency=latency.measure(one, min(timed, len(examples)), not isinstance(lm, Hosted)) if timed else None,
    )  # fmt: skip


def _ask(
    task: Task, lm: LM, sizes: "Sizes", examples: Sequence[Example], prompts: Sequence[Prompt], batch_size: int
) -> Asked:
    asked, room = sizes.check(prompts)
    by_sum, before = None, lm.prefixes.computed
    if task.kind == "choice":
        options = [e["options"] for e in examples]
        summed, completions = choose(lm, prompts, options)
        by_sum = sum(map(task.score, examples, summed)) / len(examples)
        written = [sum(len(lm.tokenizer.encode(o)) for o in row) for row in options]
        decoded = 0
    else:
        completions = lm.generate(prompts, max_new_tokens=room, rows=batch_size)
        written = [len(lm.tokenizer.encode(c)) + 1 for c in completions]  # including the end token
        decoded = sum(written)
    flops = flops_per_token(lm) * (lm.prefixes.computed - before + decoded)
    return Asked(completions, float(np.mean(asked)), float(np.mean(written)), flops, by_sum=by_sum)


def _ask_hosted(task: Task, lm: Hosted, name: str, examples: Sequence[Example], prompts: Sequence[Prompt]) -> Asked:
    """Gets answers from an endpoint. The endpoint's tokenizer is unknown, so the maximum number of tokens in an answer
    is estimated from the bytes of the longest reference."""
    if task.kind == "choice":
        what = "the options of this task are compared by log-probabilities, which endpoints do not provide"
        raise UserError(what, name, "use a local model, or rows with questions but without options")
    longest = max(len(a.encode()) for e in examples for a in e.get("references", [e["answer"]]))
    replies = lm.ask(prompts, max_new_tokens=task.max_new_tokens or min(max(LEAST, longest), MOST))
    used = lm.used(replies)
    means = [None if total is None else total / len(replies) for total in used[1:3]]
    return Asked([reply.text for reply in replies], *means, usd=used.usd)


class Sizes:
    """Counts the tokens of prompts and of the answers to `examples`, and checks whether both fit into the model's
    context."""

    def __init__(self, task: Task, lm: LM, name: str, examples: Sequence[Example], more: int = 0):
        self.lm, self.name, self.examples = lm, name, examples
        # maximum number of tokens in an answer, or 0 if not set
        self.room = task.max_new_tokens and task.max_new_tokens + more
        self.limit = lm.config.context - virtual_tokens(lm.params)
        answers = [e["options"] if task.kind == "choice" else e.get("references", [e["answer"]]) for e in examples]
        self.longest = [max(len(lm.tokenizer.encode(a)) for a in each) + 1 for each in answers]
        if task.kind != "choice":
            self.longest = [self.room or min(size, MOST) + more for size in self.longest]

    def fit(self, prompts: Sequence[Prompt]) -> bool:
        return all(len(self.lm.encode(p)) + n <= self.limit for p, n in zip(prompts, self.longest, strict=True))

    def check(self, prompts: Sequence[Prompt]) -> tuple[list[int], int]:
        """Returns (number of tokens of each prompt, maximum number of new tokens). Raises UserError if a row exceeds
        the model's context."""
        asked, longest, limit = [len(self.lm.encode(p)) for p in prompts], self.longest, self.limit
        total = [a + b for a, b in zip(asked, longest, strict=True)]
        if wide := [i for i, size in enumerate(total) if size > limit]:
            where = self.examples[wide[0]].get("where", self.name)
            what = f"{asked[wide[0]]} prompt tokens and {longest[wide[0]]} answer tokens exceed the context of {limit}"
            fix = "shorten the rows, show fewer examples, or write :tokens=N for shorter answers"
            raise UserError(f"{what} ({len(wide)} of {len(total)} rows)", where, fix)
        enough = max(LEAST, -(-max(longest) * 5 // 4 // 16) * 16)
        return asked, self.room or min(enough, MOST, limit - max(asked))


def _slices(examples: Sequence[Example], scores: Sequence[float]) -> dict[str, dict]:
    found: dict[str, list[float]] = {}
    for example, score in zip(examples, scores, strict=True):
        for column, value in example.get("slices", {}).items():
            found.setdefault(f"{column}={value}", []).append(score)
    spans = {name: stats.of_scores(part) for name, part in sorted(found.items())}
    return {
        name: {"n": len(found[name]), "mean": sum(found[name]) / len(found[name]), "low": low, "high": high}
        for name, (low, high) in spans.items()
    }


def choose(lm: LM, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Chooses among the options of each prompt by their log-likelihood given the prompt. Returns two lists with one
    option per prompt. The first list has the options with the highest total log-likelihood, the second those with the
    highest log-likelihood per byte.

    Unlike the total, the log-likelihood per byte does not favor short options. If several options are equally likely,
    the first one is chosen.
    """
    flat = [(p, o) for p, row in zip(prompts, options, strict=True) for o in row]
    logps = iter(lm.logps([p for p, _ in flat], [o for _, o in flat]))
    by_sum, by_byte = [], []
    for row in options:
        mine = [next(logps)[0] for _ in row]
        by_sum.append(row[int(np.argmax(mine))])
        by_byte.append(row[int(np.argmax([x / max(len(o.encode()), 1) for x, o in zip(mine, row, strict=True)]))])
    return by_sum, by_byte


def sample(
    question: Prompt, example: Example, completion: str, score: float, hits: Sequence[Hit], cited: Sequence[int]
) -> dict:
    """Returns one answered question for the report: the question as it was before the prompting setup was applied, the
    right answer, the model's answer, its score, and the retrieved passages."""
    found = {"prompt": text(question), "answer": example["answer"], "completion": completion, "score": score}
    passages = retrieval.sources(hits, range(1, len(hits) + 1))
    return found | ({"passages": passages, "cited": list(cited)} if hits else {})


def flops_per_token(lm: LM) -> float:
    """Returns the FLOPs of a forward pass per token: 2 per multiply-add with a weight matrix, including the output head
    (Kaplan et al. 2020). Attention scores are not counted, and neither are the virtual tokens of prefix and prompt
    tuning, which only attention reads."""
    tied, found = lm.config.tied, []

    def count(path: str, w: Array | Weight, spec: Spec | None) -> None:
        if (spec and not spec.eqn) or (path.startswith("embed") and not tied):
            return
        stacked = spec.stacked if spec else in_layers(path)
        found.extend(jax.tree.leaves(w.macs(stacked) if weights.is_weight(w) else w.size))

    weights.replace(lm.params, lm.model.specs, count)
    return 2.0 * sum(found)
