"""Makes tasks from data files whose rows have a question and an answer, in any format that training reads.

    SOURCE[:OPTION=VALUE ...]      for example rows.jsonl:scorer=number:slices=kind

SOURCE is any data source: a .jsonl, .json, .csv, .tsv or .parquet file, also compressed as .gz; a folder; or hf:REPO.
The options are:
`scorer`   One of exact, contains, number, choice, token_f1, set_f1, regex, json and rouge_l (files in evals/scorers),
           or auto (the default), which chooses one of them and prints the reason.
`split`    The rows to score: train, validation, test (the default) or all (the default if SOURCE or the file's name
           names a split, such as FILE@test). Solved examples in the prompt come from the train split. See
           data/splits.py.
`slices`   COLUMN or COLUMN+COLUMN: for each value in one of these columns, the rows with this value also get a score
           of their own.
`options`  The column with the options of a multiple-choice question, if its name is not "options" or "choices".
`tokens`   The maximum number of tokens in an answer; the default is enough for the longest reference.
`name`     The name under which results are recorded; the default is the name of the file.
If the columns do not have the names that training expects, name them like options: prompt=question:completion=answer

A row may have several references, given as a list or in SQuAD's format {"text": [...]}.
"""

import json
import math
import operator
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, did_you_mean
from data import dataset, formats, sources, splits
from data.examples import Chat, Completion, Example, Text, wrapped
from data.messages import are_turns, parsed
from evals import overlap, scorers
from evals.scorers import number
from evals.task import Task, by

OPTIONS = ("scorer", "split", "slices", "options", "tokens", "name")
COLUMNS = (
    "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system", "references",
)  # fmt: skip
# The correct answers of a row, called its references, are in the first of these columns that the row has.
ANSWERS = ("references", "completion", "answer", "answers", "response", "output", "label", "target")
EMPTY = "(none)"  # this text stands for an empty reference while a row is being read
# Three upper limits: on the options of a question if these are all answers in the file (CLASSES), on the distinct
# answers with which `auto` selects the scorer `choice` (LABELS), and on the distinct values in a column of slices
# (SLICES).
CLASSES, LABELS, SLICES = 50, 10, 50
# `auto` scores answers of up to SHORT words by exact match, and of up to PHRASE words by token F1
SHORT, PHRASE = 5, 12


def is_source(spec: str) -> bool:
    """Returns whether the name of a task refers to a data source: whether it contains a path, a file extension or an
    option, or is the name of an existing file."""
    source = parse(spec)[0]
    return bool(re.search(r"[./:@*]", spec)) or Path(source).exists()


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """Splits "SOURCE:OPTION=VALUE:..." into (source, options). A colon that is not followed by an option is part of the
    source."""
    *before, last = spec.split(":")
    if before and (found := re.fullmatch(r"([a-z_]+)=(.*)", last, re.DOTALL)):
        source, options = parse(":".join(before))
        return source, options | {found[1]: found[2]}
    return spec, {}


def name(spec: str) -> str:
    """Returns the name under which a task's results are recorded: the option `name` or, without it, the file's name. If
    the file is named after a split, such as test.jsonl, the name of its folder comes first."""
    source, options = parse(spec)
    path = Path(re.sub(r"@\w+$", "", source.partition("?")[0]))
    stem = path.name.rpartition(":")[2].split(".")[0] or path.name
    return options.get("name") or (f"{path.parent.name}-{stem}" if stem in splits.NAMES and path.parent.name else stem)


def task(spec: str) -> Task:
    """Makes an evaluation task from a data source. Raises UserError if rows cannot be read or have no answer, or if
    there are no rows to score."""
    source, options = parse(spec)
    for key in options:
        if key not in OPTIONS and key not in COLUMNS:
            fix = did_you_mean(key, (*OPTIONS, *COLUMNS), f"one of {', '.join((*OPTIONS, *COLUMNS))}")
            raise UserError(f"unknown option {key!r}", spec, fix)
    scorer = options.get("scorer", "auto")
    if scorer != "auto":
        scorers.find(scorer)
    found = _read(source, options, listed=scorer == "set_f1")
    every = [row for part in found.values() for row in part]
    why = ""
    if scorer == "auto":
        scorer, why = _chosen(every)
    _check(source, scorer, every)
    part = options.get("split") or _default(source)
    if part not in (*splits.SPLITS, "all"):
        raise UserError(f"unknown split {part!r}", spec, f"one of {', '.join(splits.SPLITS)} or all")
    scored = every if part == "all" else found[part]
    sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in found.items())
    if not scored:
        raise UserError(f"the {part} split has no rows ({sizes})", source, "add rows, or write :split=all")
    shown = [] if part in ("all", "train") else found["train"]
    notes = [f"{len(every):,} rows ({sizes}), scored: {part}"]
    notes.append(f"scorer {scorer}" + (f", since there are {why}" if why else ""))
    notes += _warnings(scored, "rows" if part == "all" else f"{part} rows")
    if part != "all":
        notes += overlap.across({name: rows for name, rows in found.items() if rows})
    texts = all(isinstance(row["prompt"], str) for row in every)
    return Task(
        examples={"train": shown, "validation": found["validation"], "heldout": scored}.__getitem__,
        prompt=_as_chat,
        score=by(scorer),
        kind="choice" if scorer == "choice" else "generate",
        max_new_tokens=_count(options.get("tokens", "0"), spec),
        raw=operator.itemgetter("prompt") if texts else None,
        scorer=scorer,
        notes=tuple(notes),
    )


def _count(text: str, spec: str) -> int:
    if not text.isdecimal():
        raise UserError(f"tokens={text} is not a whole number", spec)
    return int(text)


def _default(source: str) -> str:
    """The default split: "all" if the source or the name of the file names a split, else "test"."""
    stem = re.split("[^a-z]+", Path(source.lower()).name.split(".")[0])
    held = any(splits.NAMES.get(word, "train") != "train" for word in stem)
    return "all" if source.rpartition("@")[2] in splits.SPLITS or (held and not sources.split_names(source)) else "test"


# --- rows ---


def _read(source: str, options: dict[str, str], listed: bool) -> dict[str, list[dict]]:
    """Returns {split: rows}. Raises UserError if any row is bad, because scoring only the good rows would change the
    task."""
    found: dict[str, list[dict]] = {name: [] for name in splits.SPLITS}
    causes: dict[str, tuple[int, str]] = {}
    for part, row in _rows(source):
        try:
            if row.record is None:
                raise UserError(row.reason)
            made = _row(row.record, options, listed) | {"where": row.where}
            found[part or splits.of(row.record)].append(made)
        except UserError as e:
            fix = "" if "data.fields" in e.fix else e.fix  # only training has data.fields; the fix for tasks is below
            reason = " · ".join(filter(None, (e.what, fix)))
            count, first = causes.get(reason, (0, row.where))
            causes[reason] = (count + 1, first)
    good, bad = sum(map(len, found.values())), sum(count for count, _ in causes.values())
    if bad:
        reasons = "; ".join(dataset.causes(causes))
        fix = "fix or remove them" if good else "name the columns: FILE:prompt=COLUMN:completion=COLUMN"
        raise UserError(f"{bad:,} of {good + bad:,} rows are not a question with an answer: {reasons}", source, fix)
    if not good:
        raise UserError("there are no rows", source, "check that the file has rows below its header")
    return found


def _rows(source: str) -> Iterator[tuple[str, sources.Row]]:
    """Yields (split, row) for all rows. The split is "" if it has yet to be derived from the row's contents."""
    if names := sources.split_names(source):
        for name in names:
            yield from ((splits.NAMES.get(name, "train"), row) for row in sources.rows(f"{source}@{name}"))
    else:
        yield from (("", row) for row in sources.rows(source))


def _row(record: dict, options: dict[str, str], listed: bool) -> dict:
    for ours, theirs in options.items():
        if ours in COLUMNS:
            if theirs not in record:
                columns = ", ".join(map(str, record))
                raise UserError(f"there is no column {theirs!r} (for {ours}); the columns are {columns}")
            record = record | {ours: record[theirs]}
    column = next((c for c in ANSWERS if c in record and record[c] is not None), "")
    given = references(record[column], column, listed) if column else None
    found = _example(record, column, given)
    prompt, own = _asked(found)
    if given and (own in (None, given[0] or EMPTY) or column == "references"):
        answers = given
    elif own:
        answers = [own]  # use the answer that training would use, whatever the other columns contain
    else:
        raise UserError("the row has no answer")
    row = {"prompt": prompt, "references": answers, "answer": answers[0], "slices": _slices(record, options)}
    column = options.get("options", "") or next((c for c in ("options", "choices") if record.get(c)), "")
    return row | (_options(record.get(column), column, answers) if column else {})


def references(value: Any, column: str, listed: bool) -> list[str] | None:
    """Returns the references in a cell, or None if the cell contains chat turns. A list stands for several references
    or, if `listed` is True, for a single reference that is a set of items."""
    if are_turns(value) or are_turns(parsed(value)):
        return None
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]  # SQuAD's format; an empty list means that the question has no answer
    if isinstance(value, list):
        return [json.dumps(value, ensure_ascii=False)] if listed else [_text(v) for v in value] or [""]
    if isinstance(value, str) and not value.strip():
        raise UserError(f"column {column!r} is empty")
    return [_text(value)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _example(record: dict, column: str, given: list[str] | None) -> Example:
    """Reads the example in a record. The references may have any type, and the columns need not have the names that
    training expects."""
    if given:
        record = record | {column: given[0] or EMPTY}
    try:
        found = formats.example(record)
        if not (isinstance(found, Text) and given):
            return found
    except UserError:
        if not given:
            raise
    asked = next((c for c in (*formats.PROMPTS, "text") if record.get(c) and c != column), "")
    if not asked:
        raise UserError("no column has a question", "", f"write prompt=COLUMN; the columns are {', '.join(record)}")
    return formats.example(record | {"prompt": record[asked], "completion": given[0] or EMPTY}, "prompt_completion")


def _asked(found: Example) -> tuple[str | list[dict], str | None]:
    """Returns (prompt, answer) of an example. The answer is None if a chat does not end with an assistant's turn."""
    if isinstance(found, Completion):
        return found.prompt, found.completion
    if not isinstance(found, Chat):
        raise UserError(f"a {found.kind} record is not a question with an answer")
    if found.tools:
        raise UserError("tools are not supported in tasks")
    *before, last = found.messages
    if last["role"] != "assistant":
        return [*before, last], None
    if not before:
        raise UserError("the answer has no question")
    return before, last["content"] or None


def _slices(record: dict, options: dict[str, str]) -> dict[str, str]:
    columns = list(filter(None, options.get("slices", "").split("+")))
    if missing := [c for c in columns if c not in record]:
        raise UserError(f"there is no column {missing[0]!r} (for slices)")
    return {c: _text(record[c]) for c in columns}


def _options(value: Any, column: str, answers: list[str]) -> dict:
    """Returns the options of a row and its references. Each reference is returned as the text of an option. In the
    file, a reference may be the text, the label or the index of an option."""
    value = parsed(value)
    labels = list(string.ascii_uppercase)
    if isinstance(value, dict) and {"text", "label"} <= value.keys():  # ARC's format
        value, labels = value["text"], list(map(_text, value["label"]))
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"column {column!r} is not a list of two options or more")
    texts = list(map(_text, value))
    found = []
    for answer in answers:
        at = labels.index(answer) if answer in labels else int(answer) if answer.isdecimal() else len(texts)
        if answer not in texts and at >= len(texts):
            raise UserError(f"the answer {answer!r} is not one of the options")
        found.append(answer if answer in texts else texts[at])
    return {"options": tuple(texts), "references": found, "answer": found[0]}


# --- scorers ---


def _chosen(rows: Sequence[dict]) -> tuple[str, str]:
    """Returns (name of the scorer that fits the references, reason for the choice)."""
    if all("options" in row for row in rows):
        return "choice", "options in every row"
    answers = [reference for row in rows for reference in row["references"]]
    several = max(len(row["references"]) for row in rows)
    first = Counter(row["answer"] for row in rows)
    if several == 1 and 1 < len(first) <= LABELS and len(rows) >= 10 * len(first):
        return "choice", f"{len(first)} different answers in {len(rows):,} rows"
    if all(number.MARK in a or re.fullmatch(rf"\s*\$?{number.NUMBER.pattern}\s*%?\.?\s*", a) for a in answers):
        return "number", "numbers in all answers"
    if all(isinstance(parsed(a), dict) for a in answers):
        return "json", "JSON objects in all answers"
    if all(isinstance(parsed(a), list) for a in answers):
        return "set_f1", "lists in all answers"
    words = sorted(len(a.split()) for a in answers)
    longest, kind = words[-1], f"up to {several} references per row" if several > 1 else "answers"
    if longest <= SHORT:
        return "exact", f"{kind} of at most {longest} word{'s' * (longest > 1)}"
    if words[math.ceil(0.95 * len(words)) - 1] <= PHRASE:
        return "token_f1", f"{kind}, 95 % of them of at most {PHRASE} words"
    return "rouge_l", f"{kind} of up to {longest} words"


def _check(source: str, scorer: str, rows: Sequence[dict]) -> None:
    """Raises UserError if the scorer cannot read the references. If the scorer is `choice`, the options of a row that
    has none are all answers that occur in the file."""
    check = scorers.checker(scorer)
    for row in rows:
        try:
            for reference in row["references"]:
                check(reference)
        except UserError as e:
            raise UserError(e.what, row["where"], e.fix) from None
    without = [row for row in rows if "options" not in row]
    if scorer != "choice" or not without:
        return
    classes = tuple(sorted({row["answer"] for row in rows}))
    if len(classes) > CLASSES:
        fix = "add a column of options, or choose another scorer"
        raise UserError(f"{len(classes):,} different answers exceed the limit of {CLASSES} options", source, fix)
    if len(classes) == 1:
        what = f"every row has the answer {classes[0]!r}, so there is nothing to choose"
        raise UserError(what, source, "add other rows")
    for row in without:
        row["options"] = classes


def _warnings(rows: Sequence[dict], what: str) -> list[str]:
    first = Counter(row["answer"] for row in rows)
    (answer, count), n = first.most_common(1)[0], len(rows)
    lines = []
    if count > 1 and (count > n / 5 or len(first) == 1):
        every = f"all {what} have" if len(first) == 1 else f"{count / n:.0%} of the {what} have"
        lines.append(f"{every} the answer {answer[:40]!r}, so a model that always gives it gets them right")
    for column in rows[0]["slices"]:
        if len(values := {row["slices"][column] for row in rows}) > SLICES:
            what = f"column {column!r} has {len(values):,} different values"
            raise UserError(what, "slices", f"name a column with at most {SLICES}")
    return lines


# --- prompts ---


def _as_chat(row: dict) -> list[dict]:
    """Converts the question to messages, as in training with a chat template."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, list) else wrapped(Completion(prompt, EMPTY)).messages[:-1]
