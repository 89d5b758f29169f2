"""Reads prompts from any data source and samples answers to them, for people or judge models to compare."""

from collections.abc import Iterator, Sequence

from common.errors import UserError
from common.types import Json
from data import formats, messages, sources
from data.examples import Chat, Completion, wrapped
from evals import rows
from evals.task import Prompt
from infer import hosted
from infer.hosted import Hosted
from infer.lm import LM

ROWS = 16  # number of answers that are sampled at once


def prompts(source: str) -> Iterator[tuple[str, Prompt, Json]]:
    """Yields (location, prompt, record) for each row. If the row has a known format, the prompt is everything before
    the answer.

    Raises UserError for a row without a prompt.
    """
    for row in sources.rows(source):
        if row.record is None:
            raise UserError(row.reason, row.where)
        try:
            yield row.where, _prompt(row.record), row.record
        except UserError as e:
            fix = "name the column prompt, question, instruction or messages"
            raise UserError(f"the row has no prompt: {e.what}", row.where, fix) from None


def _prompt(record: Json) -> Prompt:
    column = next((name for name in formats.PROMPTS if record.get(name)), "")
    try:
        found = formats.example(record).parts()[0]
    except UserError:
        if not column:
            raise
        value = messages.parsed(record[column])
        return value if isinstance(value, str) else messages.messages(value, column)
    if isinstance(found, Completion):
        return found.prompt
    if isinstance(found, Chat):
        last = max((i for i, turn in enumerate(found.messages) if turn["role"] == "assistant"), default=None)
        return list(found.messages[: found.first or last])
    return found.plain()


def references(record: Json) -> list[str] | None:
    """Returns the correct answers in a record, or None if no column contains any."""
    column = next((name for name in rows.ANSWERS if record.get(name) not in (None, "")), "")
    return rows.references(record[column], column, listed=False) if column else None


def items(source: str) -> list[Json]:
    """Reads records of the form {"prompt": ..., "answers": [{"text": ..., "model": ...}, ...]}. Raises UserError for
    any other record."""
    found = []
    for where, prompt, record in prompts(source):
        said = messages.parsed(record.get("answers"))
        if not isinstance(said, list) or len(said) < 2 or not all(_is_answer(a) for a in said):
            fix = "write such records with tools.sample_pairs"
            what = 'the column "answers" must be a list of two or more objects with the key "text"'
            raise UserError(what, where, fix)
        found.append(record | {"prompt": prompt, "answers": [{"model": "unnamed"} | a for a in said]})
    if not found:
        raise UserError("there are no items", source)
    return found


def _is_answer(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str) and isinstance(value.get("model", ""), str)


def model(name: str) -> LM | Hosted:
    """Loads a model by its name: a local model, a run folder, a base model with an adapter (BASE+FOLDER), or a hosted
    model."""
    base, _, adapter = ("", "", "") if hosted.is_hosted(name) else name.partition("+")
    return hosted.load(base or name, adapter or None)


def asked(prompt: Prompt, lm: LM | Hosted) -> Prompt:
    """Converts the prompt to the form that a model expects. If the model expects chats, a plain text becomes one user
    turn, and the text of a transcript is split into its turns."""
    if not isinstance(prompt, str) or (isinstance(lm, LM) and lm.tokenizer.chat_template is None):
        return prompt
    found = wrapped(Completion(prompt, "-"))
    return list(found.messages[:-1]) if isinstance(found, Chat) else prompt


def sample(
    lm: LM | Hosted, texts: Sequence[Prompt], count: int, *, max_new_tokens: int, seed: int, **knobs: float
) -> list[list[str]]:
    """Samples `count` independent answers to each prompt. Each answer depends only on the prompt, the seed, and its
    index among the answers to this prompt."""
    out: list[list[str]] = []
    size = max(1, ROWS // count)
    for at in range(0, len(texts), size):
        rows = [asked(prompt, lm) for prompt in texts[at : at + size]]
        # Pad the last batch, so that fewer shapes are compiled.
        filled = rows + rows[-1:] * (size - len(rows)) if isinstance(lm, LM) else rows
        flat = [prompt for prompt in filled for _ in range(count)]
        found = lm.generate(flat, max_new_tokens=max_new_tokens, seed=seed, **knobs)
        out += [found[i * count : (i + 1) * count] for i in range(len(rows))]
    return out
