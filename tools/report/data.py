"""Reads run folders into plain rows for the report. Every number in a report comes from files in these folders."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import files, gas, paths, record
from common.errors import UserError, reading
from common.types import Json
from evals import paired

METHODS = {"lora": "LoRA"}
# Fields that identify a result. Of several results that agree in all of these fields, only the newest is shown.
WAY = ("task", "split", "shots", "context", "n", "seed", "adapter", "index", "task_hash")


class Run(NamedTuple):
    """The contents of a run folder's files. `config` is {} if the folder has only results of evals.main."""

    path: Path
    config: dict
    cost: dict
    environment: dict
    metrics: list[dict]
    evals: list[dict]

    @property
    def name(self) -> str:
        return self.path.name

    def lines(self, kind: str) -> list[dict]:
        return [line for line in self.metrics if line["kind"] == kind]

    @property
    def step(self) -> int:
        """The last step that the run has reached."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def done(self) -> dict:
        """The line in metrics.jsonl that a finished run wrote last, or {} if the run has not finished."""
        return next((line for line in reversed(self.metrics) if line.get("event") == "done"), {})


class Choice(NamedTuple):
    """One way to solve a task, with its result and the cost of its training. Unknown costs are None."""

    label: str
    task: str
    result: dict  # a result of evals.run.evaluate
    run: Run
    flops: float | None
    seconds: float | None
    peak_bytes: float | None
    store_bytes: float | None
    forgetting: float | None  # rise of the loss on general text, in nats per token
    text: str  # name of this general text


def read(folder: str | Path) -> Run:
    path = Path(folder)
    if not path.is_dir():
        fix = paths.nearest(path, "name run folders, or folders with an evals.jsonl")
        raise UserError("no such folder", str(path), fix)
    paths.regular(path)
    found = {name: files.read_json(path / f"{name}.json") for name in ("config", "cost", "environment")}
    metrics = record.read(path / "metrics.jsonl")
    own = [line for line in metrics if line["kind"] == "task"]  # results of config.evals
    evals = sorted(own + files.read_lines(path / "evals.jsonl"), key=lambda line: line.get("step", math.inf))
    run = Run(path, **found, metrics=metrics, evals=evals)
    if not run.metrics and not run.evals:
        raise UserError("the folder has neither metrics.jsonl nor evals.jsonl", str(path))
    return run


# --- how a run was trained ---


def method(config: dict) -> str:
    """Returns the name of a config's training method, such as "LoRA on nf4", "full fine-tuning" or "dpo with LoRA"."""
    if not config:
        return "prompting"
    name = lambda key: (config.get(key) or {}).get("name") or ""
    peft, quant, objective = name("peft"), name("quant"), name("objective")
    trainable = config.get("trainable") or "all"
    if peft:
        text = METHODS.get(peft, peft) + (f" on {quant}" if quant else "")
    elif not config.get("init"):
        text = "from scratch"
    elif trainable in ("all", "auto"):
        text = "full fine-tuning"
    else:
        text = f"fine-tuning of {trainable}"
    if quant and not peft:
        text += f" ({quant})"
    if objective in ("", "sft"):
        return text
    return f"{objective} {text}" if text.startswith("from scratch") else f"{objective} with {text}"


def label(method: str, rank: int | None) -> str:
    return method + (f" r={rank}" if rank else "")


def of_run(run: Run) -> str:
    return label(method(run.config), (run.config.get("peft") or {}).get("rank"))


def seconds(run: Run) -> float | None:
    """Returns the seconds that all sessions of a run spent on compilation and steps. Loading, evaluation and saving are
    not counted."""
    spent = [s.spent for s in gas.sessions(run.metrics)]
    return sum(s.get(k, 0.0) for s in spent for k in ("compile", "data", "step")) if spent else None


def used(runs: list[Run]) -> list[tuple[str, gas.Gas]]:
    """Returns (name, resources used) for every run that trained and, if there are several, an entry for their sum."""
    rows = [(r.name, gas.line(r.metrics, r.environment, r.config.get("chip") or "")) for r in runs if r.metrics]
    return [*rows, ("all runs", gas.total(g for _, g in rows))] if len(rows) > 1 else rows


def stored(folder: Path) -> int | None:
    """Returns the bytes of the trained parameters in the newest checkpoint. They are stored in addition to the base
    model."""
    steps = sorted((p for p in (folder / "ckpt").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    if not steps:
        return None
    with reading(steps[-1]):
        leaves = files.load_json(steps[-1] / "state_hashes.json")["manifest"]["leaves"]
        return sum(_bytes(leaf) for name, leaf in leaves.items() if name.startswith("params/")) or None


def _bytes(leaf: dict) -> int:
    width = {"bool": 1, "bfloat16": 2}.get(leaf["dtype"]) or int("".join(filter(str.isdigit, leaf["dtype"]))) // 8
    for n in leaf["shape"]:
        width *= n
    return width


# --- scores and costs ---


def choices(runs: list[Run]) -> dict[str, list[Choice]]:
    """Returns {task: choices}, in the order of the runs. If several results in a folder agree in all fields of WAY,
    only the newest is used.

    If runs were scored on different questions of a task, or by different scorers, their results are listed separately
    as "TASK, scored as HASH".
    """
    out: dict[tuple[str, str], list[Choice]] = {}
    for run in runs:
        for result in newest(run.evals, WAY):
            key = result["task"], result.get("task_hash", "an earlier version did")
            out.setdefault(key, []).append(choice(run, result, runs))
    tasks = [task for task, _ in out]
    names = {(task, how): f"{task}, scored as {how}" if tasks.count(task) > 1 else task for task, how in out}
    return {names[key]: _distinct([c._replace(task=names[key]) for c in rows]) for key, rows in out.items()}


def _distinct(rows: list[Choice]) -> list[Choice]:
    """Makes labels unique: appends the run's name to labels that occur more than once."""
    labels = [c.label for c in rows]
    return [c._replace(label=f"{c.label} ({c.run.name})") if labels.count(c.label) > 1 else c for c in rows]


def newest(lines: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Returns the last line for each combination of values of `keys`, in the order in which the combinations first
    appear. Lines without the first key are ignored."""
    found = {tuple(map(str, map(line.get, keys))): line for line in lines if keys[0] in line}
    return list(found.values())


def choice(run: Run, result: dict, runs: list[Run]) -> Choice:
    trained, asked = bool(run.config), paired.asked(result)
    label = (of_run(run) + f", {asked}" * (asked != "zero-shot")) if trained else asked
    if old := trained and result.get("step", run.step) < run.step:
        label += f", at step {result['step']:,} of {run.step:,}"
    change, text = forgetting(run, runs)
    return Choice(
        label=label,
        task=result["task"],
        result=result,
        run=run,
        flops=(None if old else run.done.get("flops")) if trained else 0,
        seconds=(None if old else seconds(run)) if trained else 0,
        peak_bytes=run.done.get("peak_rss_bytes"),
        store_bytes=stored(run.path) if trained else 0,
        forgetting=change if trained else 0,
        text=text,
    )


def forgetting(run: Run, runs: list[Run]) -> tuple[float | None, str]:
    """Returns how much higher a run's loss on general text is than that of its initial model, and the name of the text.
    Returns (None, "") unless evals.main has measured both losses on the same passages."""
    keys = ("text", "n")
    for after in newest(run.evals, keys):
        for other in runs:
            for before in newest(other.evals, keys) if not other.config else ():
                same = all(after[k] == before[k] for k in (*keys, "tokens"))
                if same and before.get("model") == run.config.get("init"):
                    return after["loss"] - before["loss"], after["text"]
    return None, ""


# --- curves, samples, configs ---


def written(run: Run) -> list[tuple[str, list[tuple[int, str]]]]:
    """Returns (prompt, [(step, answer)]) for the answers that a run sampled before and after training."""
    out: dict[str, list[tuple[int, str]]] = {}
    for line in run.lines("sample"):
        out.setdefault(line.get("prompt", ""), []).append((line["step"], line.get("answer", "")))
    return list(out.items())


def curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Returns the training loss and the held-out loss, each as points (step, loss)."""
    pick = lambda kind, key: [(line["step"], line[key]) for line in run.lines(kind) if _number(line.get(key))]
    return {"train": pick("train", "loss"), "held-out": pick("eval", "nll") or pick("eval", "loss")}


# Charts for runs that learn from preferences: (y axis, metric of chosen answers, metric of rejected answers).
PREFERENCES = (
    ("log-probability of an answer, nats", "logp_chosen", "logp_rejected"),
    ("reward", "reward_chosen", "reward_rejected"),
    ("fraction of pairs in which the chosen answer has the higher reward", "accuracy", ""),
    ("KL from the reference per token, nats", "kl_per_token", ""),
    ("answer length in tokens", "length_chosen", "length_rejected"),
)


def preferences(run: Run) -> list[tuple[str, list[tuple[str, list[tuple[float, float]]]]]]:
    """Returns (axis, [(name, points)]) for the metrics that a run measured on held-out pairs or, if there are none, on
    training pairs."""
    lines = run.lines("eval") if any("reward_chosen" in line for line in run.lines("eval")) else run.lines("train")
    if not any("reward_chosen" in line for line in lines):
        return []
    pick = lambda key: [(line["step"], line[key]) for line in lines if _number(line.get(key))]
    found = [(axis, [(name, pick(name)) for name in names if name and pick(name)]) for axis, *names in PREFERENCES]
    return [(axis, series) for axis, series in found if series]


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def side_by_side(rows: Sequence[tuple[str, Json]], n: int) -> list[tuple[dict, list[tuple[str, dict]]]]:
    """Returns (question, [(label, sample)]) for n examples that occur in all results. Each row is (label, result of
    evals.run.evaluate).

    Two examples are in the same group if each method has the same score on both. In each round, one example is taken
    from every group, starting with the groups in which the methods differ. The selection therefore does not favor any
    method.
    """
    answered = {label: {s["prompt"]: s for s in result.get("samples", ())} for label, result in rows}
    common = [s for s in rows[0][1].get("samples", ()) if all(s["prompt"] in a for a in answered.values())]
    out = [(s, [(label, a[s["prompt"]]) for label, a in answered.items()]) for s in common]
    seen: Counter = Counter()
    turns = []
    for pair in out:
        pattern = tuple(s["score"] for _, s in pair[1])
        turns.append((seen[pattern], len(set(pattern)) == 1))
        seen[pattern] += 1
    return [pair for _, pair in sorted(zip(turns, out, strict=True), key=lambda x: x[0])][:n]


def flat(config: dict, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        at = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from flat(value, at)
        else:
            yield at, value


def config_rows(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Returns (key, one value per run) for the config keys that differ between runs. A run that lacks the key has the
    value ""."""
    tables = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [json.dumps(t[key]) if key in t else "" for t in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
