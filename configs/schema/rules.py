"""Checks the values of a config against a table of ranges and choices per key, and by rules that involve several keys.

The types of the keys come from the defaults in `base.py` or from the keyword arguments of methods.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping

from common.errors import did_you_mean
from common.types import Leaf
from configs.models import SHAPES, resized
from configs.schema import methods
from configs.schema.keys import refusal
from configs.schema.problems import Problem, show

SHARE, POSITIVE, COUNT, ANY_COUNT = "[0, 1]", "(0, inf)", "[1, inf)", "[0, inf)"

FORMATS, SCORED = (methods.constant(methods.ROOT / "data/formats.py", name, {}) for name in ("FORMATS", "SCORED"))

# {path: interval of numbers, or tuple of choices}. If the value of a key is a tuple, each element must be a choice.
# Most choices in this table are names of files or keys of other tables; other choices are mostly listed in base.py.
ALLOWED: dict[str, str | tuple[str, ...]] = {
    "seed": "[0, 4294967296)",
    "steps": COUNT,
    "epochs": ANY_COUNT,
    "accum": COUNT,
    "allow": ("data", "config"),
    "model.shape": ("", *SHAPES),
    "model.layers": COUNT,
    "model.embed": COUNT,
    "model.heads": COUNT,
    "model.kv_heads": COUNT,
    "model.mlp": COUNT,
    "model.vocab_size": COUNT,
    "peft.rank": COUNT,
    "peft.alpha": POSITIVE,
    "peft.dropout": "[0, 1)",
    "peft.block": "[2, inf)",
    "peft.terms": ANY_COUNT,
    "peft.tokens": COUNT,
    "quant.group": COUNT,
    "quant.start": ANY_COUNT,
    "data.holdout": "[0, 1)",
    "data.format": tuple(FORMATS),
    "data.learn": ("all", "last"),
    "data.seq_len": COUNT,
    "data.batch_size": COUNT,
    "data.packing": methods.constant(methods.ROOT / "data/rows/layout.py", "PACKINGS", ()),
    "data.max_bad": SHARE,
    "optim.lr": ANY_COUNT,
    "optim.warmup": ANY_COUNT,
    "optim.decay": SHARE,
    "optim.final_lr": SHARE,
    "optim.b1": "[0, 1)",
    "optim.b2": "[0, 1)",
    "optim.eps": POSITIVE,
    "optim.weight_decay": ANY_COUNT,
    "optim.clip": ANY_COUNT,
    "optim.max_bad_steps": COUNT,
    "log_every": COUNT,
    "eval_every": ANY_COUNT,
    "eval_batches": ANY_COUNT,
    "eval_n": COUNT,
    "ckpt.every": ANY_COUNT,
    "ckpt.minutes": POSITIVE,
    "ckpt.keep": COUNT,
    "ckpt.keep_every": ANY_COUNT,
    "chip": ("", *json.loads((methods.ROOT / "common/chips.json").read_text("utf-8"))["chips"]),
}
STRINGS = ("allow", "evals", "samples")  # keys whose values are tuples of strings
REGEXES = ("peft.where", "peft.inputs", "quant.where")
# A floor limits an evaluation metric (">=", "<="), or how far the metric may drop or rise from its value at step 0.
FLOORS = (">=", "<=", "drop", "rise")
FACTORS = ("optim.lr_scale", "peft.ranks", "peft.alphas")  # pairs of a regular expression and a number


def check_value(path: str, value: Leaf, choices: tuple = ()) -> Iterator[tuple[str, str]]:
    """Checks a value that has the right type. Yields (problem, fix) for each problem."""
    allowed = choices or ALLOWED.get(path, ())
    if path in STRINGS and not all(isinstance(v, str) for v in value):
        yield "must hold strings", "quote each one"
    elif isinstance(allowed, str):
        if not _inside(value, allowed):
            yield f"must be in {allowed}", ""
    elif allowed:
        wrong = [v for v in (value if isinstance(value, tuple) else (value,)) if v not in allowed]
        yield from (refusal(v, allowed) for v in wrong)
    if path in REGEXES or (path == "trainable" and value not in ("all", "adapters")):
        yield from _regex(value)
    if path in FACTORS:
        yield from _factors(value)
    if path == "floors":
        yield from _floors(value)
    if path == "data.fields" and not re.fullmatch(r"(\s*\w+\s*=[^=,]+(,|$))*", value):
        yield "must be NEW=OLD pairs separated by commas", 'like "prompt=question,completion=answer"'
    if path.startswith("mesh.") and value != -1 and value < 1:
        yield "must be at least 1, or -1", "-1 means all remaining devices"


def _inside(value: float, interval: str) -> bool:
    low, high = interval[1:-1].split(", ")
    above = value >= float(low) if interval[0] == "[" else value > float(low)
    below = value <= float(high) if interval[-1] == "]" else value < float(high)
    return above and below


def _regex(value: str) -> Iterator[tuple[str, str]]:
    try:
        re.compile(value)
    except re.error as e:
        yield f"is not a regular expression: {e}", ""


def _factors(rules: tuple) -> Iterator[tuple[str, str]]:
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str) and _is_factor(rule[1])):
            yield "must be pairs of a regular expression and a factor", 'like (("embed/.*", 0.1),)'
            return
        yield from _regex(rule[0])


def _is_factor(x: object) -> bool:
    return _is_number(x) and x >= 0


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _floors(floors: tuple) -> Iterator[tuple[str, str]]:
    for floor in floors:
        match floor:
            case (str(name), ">=" | "<=", bound) if name.startswith("eval/") and _is_number(bound):
                continue
            case (str(name), "drop" | "rise", bound) if name.startswith("eval/") and _is_factor(bound):
                continue
        fix = 'like (("eval/dates", ">=", 0.8), ("eval/nll", "rise", 0.1)); a drop or rise must not be negative'
        yield f"must be triples: a metric, one of {', '.join(FLOORS)}, and a number", fix
        return


def check_between(c: Mapping[str, Leaf], ok: Callable[..., bool]) -> Iterator[Problem]:
    """Yields the problems found by rules that involve several keys. `c` is {path: value}, and `ok(*paths)` returns
    whether all of these keys are set and valid."""
    for rule in (_shape, _init, _trainable, _saved, _rows, _kinds, _schedule, _evals, _measured):
        for path, text, fix in rule(c, ok):
            yield Problem(f"config.{path}", show(c[path]), text, fix)


def _shape(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    if not ok("model.shape", "model.embed", "model.heads", "model.kv_heads") or not c["model.shape"]:
        return
    own = {k: c[f"model.{k}"] for k in ("embed", "heads", "kv_heads") if c[f"model.{k}"]}
    shape = resized(c["model.shape"], own)
    embed, heads, kv_heads = (shape[k] for k in ("embed", "heads", "kv_heads"))
    if own.keys() & {"embed", "heads"}:  # otherwise the named shape defines the head size
        path = "model.heads" if "heads" in own else "model.embed"
        if embed % heads:
            yield path, f"embed {embed} is not a multiple of heads {heads}", "the head size is embed / heads"
        elif embed // heads % 2:
            yield path, f"the head size {embed} / {heads} is odd", "rotary embeddings need an even size"
    if heads % kv_heads:
        path = "model.kv_heads" if "kv_heads" in own else "model.heads"
        yield path, f"heads {heads} is not a multiple of kv_heads {kv_heads}", "kv heads must share the heads equally"
    if shape.get("recurrent", 0) % heads:
        yield "model.heads", f"the recurrent width {shape['recurrent']} is not a multiple of heads {heads}", ""
    if ok("mesh.tensor") and c["mesh.tensor"] > 1 and heads % c["mesh.tensor"]:
        yield "mesh.tensor", f"does not divide heads {heads}", "heads cannot be split between devices"


def _init(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    if not ok("model.shape", "init") or c["model.shape"]:
        return
    if not c["init"]:
        yield (
            "model.shape",
            "the config names no model",
            "set config.model.shape, or config.init for pretrained weights",
        )
    for path in (f"model.{k}" for k in ("layers", "embed", "heads", "kv_heads", "mlp", "vocab_size")):
        if ok(path) and c[path] is not None:
            yield path, "overrides a model shape, but none is named", "set config.model.shape"


def _trainable(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    if ok("trainable", "peft.name") and c["trainable"] == "adapters" and not c["peft.name"]:
        yield "trainable", "there are no adapters", "set config.peft.name, or config.trainable=all"


def _saved(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    if ok("init", "peft.name", "peft.folder") and c["peft.name"] == "saved" and c["init"] == c["peft.folder"]:
        yield "init", "is the run that trained the adapter", "name the base model that the adapter was trained on"


def _rows(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    sizes = {a: c[f"mesh.{a}"] for a in ("data", "fsdp", "tensor", "context") if ok(f"mesh.{a}")}
    remaining = [a for a in sizes if sizes[a] == -1]
    if len(remaining) > 1:
        yield f"mesh.{remaining[1]}", f"only one axis may be -1, and {remaining[0]} already is", "set a number"
    if ok("data.batch_size", "accum", "data.seq_len"):
        known = {a: n for a, n in sizes.items() if n > 0}
        yield from shares(c["data.batch_size"], c["accum"], c["data.seq_len"], known)


def shares(rows: int, accum: int, length: int, mesh: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    """Yields (path, problem, fix) for each reason why a batch [rows, length] cannot be split over the axes of a
    mesh."""
    devices, context = mesh.get("data", 1) * mesh.get("fsdp", 1), mesh.get("context", 1)
    if rows % accum:
        yield "data.batch_size", f"is not a multiple of accum {accum}", "micro-batches must be of equal size"
    elif rows % (accum * devices):
        fix = f"use a multiple of {accum * devices}, or fewer devices on config.mesh.data and config.mesh.fsdp"
        yield "data.batch_size", f"{rows} is not divisible by {devices} devices x {accum} micro-batches", fix
    if length % context:
        yield "mesh.context", f"{context} does not divide data.seq_len {length}", "every device needs an equal part"


def _kinds(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    if not ok("objective.name", "data.format", "data.packing"):
        return
    objective, form = c["objective.name"], c["data.format"]
    kind, given = methods.method("objective", objective).batch, FORMATS[form]
    kinds = ("", kind, *SCORED) if kind == "lm" else ("", kind)  # "lm" objectives ignore the scores of rows
    fitting = [name for name, made in FORMATS.items() if made in kinds]
    if given not in kinds and len(fitting) > 1:  # otherwise "auto" is the only fitting format
        text = f"makes batches of kind {given!r}, but objective {objective} reads {kind!r}"
        yield "data.format", text, f"one of {', '.join(fitting)}"
    elif c["data.packing"] != "none" and {kind, given} & {"pair", "match", "group", *SCORED}:
        yield (
            "data.packing",
            "pairs, matches, groups and scored rows cannot be packed",
            "set config.data.packing=none",
        )


def _schedule(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    if not ok("steps", "optim.warmup"):
        return
    steps, warmup = c["steps"], c["optim.warmup"]
    if warmup >= max(1, steps):
        yield "optim.warmup", f"exceeds the {steps} steps of the run", "a value below 1 is a fraction of the steps"
        return
    share = warmup if warmup < 1 else warmup / steps
    if ok("optim.schedule", "optim.decay") and c["optim.schedule"] == "wsd" and share + c["optim.decay"] > 1:
        yield "optim.decay", f"plus a warm-up of {share:g} exceeds 1", "both are fractions of the steps"


def _evals(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    if ok("evals") and c["evals"]:
        tasks = methods.names(methods.TASKS, "task")
        for name in c["evals"]:
            if name not in tasks and not re.search(r"[./:@]", name):  # files are checked when the run reads them
                known = f"{methods.TASKS} has {', '.join(tasks) or 'none yet'}"
                yield "evals", f"no task {name!r}", did_you_mean(name, tasks, known)


def _measured(c: Mapping, ok: Callable) -> Iterator[tuple[str, str, str]]:
    if not ok("floors", "evals", "eval_text"):
        return
    for figure in (name.removeprefix("eval/") for name, _, _ in c["floors"]):
        if figure in methods.names(methods.TASKS, "task") and figure not in c["evals"]:
            yield "floors", f"task {figure!r} is not scored", "add it to config.evals"
        if figure == "text_nll" and not c["eval_text"]:
            yield "floors", "eval/text_nll is not measured, since config.eval_text is not set", "set config.eval_text"
