"""What training saw is what is served: templates and system texts stay with runs, exports and adapters."""

import json

import numpy as np
import pytest

from data import dataset
from data.rows.layout import painted
from data.text import chat, formats
from infer import models
from infer.lm import LM
from tests.cases import people
from tests.cases.people import A, S, U, tokenizer
from train import inputs


def test_a_run_keeps_the_template_and_the_system_text(tmp_path):
    """Also when it is saved once more, as an export does."""
    tok = tokenizer()
    trained, _ = chat.tokens_and_mask([S, U, A], tok)
    inputs.keep_tokenizer(tok, tmp_path, "S")
    kept = formats.load(tmp_path / "tokenizer")
    kept.save(tmp_path / "exported")
    for served in (kept, formats.load(tmp_path / "exported")):
        asked = chat.encode([U], served)
        assert asked == trained[: len(asked)] and served.decode(asked).startswith("<|im_start|>system\nS<|im_end|>")
    other = [{"role": "system", "content": "T"}, U]
    assert chat.encode(other, kept) == chat.encode(other, tok)


def test_adapters_are_asked_by_the_templates_of_their_training(tmp_path, monkeypatch):
    base, raw = tokenizer(), tokenizer(None)
    for name, tok in (("same", base), ("raw", raw)):
        tok.save(tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    folders = {name: tmp_path / name for name in ("same", "raw")}
    lm = LM(None, None, base, tokenizers=models._own_tokenizers(folders, base))
    asked = []
    monkeypatch.setattr(LM, "generate", lambda self, prompts, **_: asked.extend(prompts))
    lm.answer(["Q", "Q", "Q"], adapters=[None, "same", "raw"])
    assert asked == [[U], [U], "Q"]


def test_control_tokens_are_painted_apart_from_text_that_looks_like_them():
    tok = tokenizer()
    ids = tok.encode("<|im_end|>a") + tok.encode("b<|im_end|>", special=True)
    row = {"tokens": np.array([ids]), "segments": np.ones((1, len(ids)), int), "mask": np.zeros((1, len(ids)))}
    row["mask"][0, 10:] = 1
    text = painted(row, 0, tok)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {"<|im_end|>a": "dim", "b": "green", "<|im_end|>": "green reverse"}


NOTES = {
    "no answer ends with a token that ends generation ('<|im_end|>'): the model will not learn to stop": (
        {"messages": [U, A]}, people.NO_END, {}),
    "2 prompts are wrapped in the chat template (data.chat_template=none leaves them raw)": (
        {"prompt": "Q", "completion": "A"}, people.CHATML, {}),
    "2 rows contain names of control tokens, which are read as plain text "
    "(data.read_control=True reads them as control tokens)": (
        {"text": "a<|im_end|>"}, people.CHATML, {}),
    "2 chats whose template renders earlier answers differently from the last: each was rendered as if it were the "
    "last": (
        {"messages": [U, A, U, A]}, people.FORGETS, {}),
    "": ({"messages": [U, A, U, A]}, people.FORGETS, {"learn": "last"}),
}  # fmt: skip


@pytest.mark.parametrize("note", NOTES)
def test_what_to_look_at_is_said(note, tmp_path):
    record, template, options = NOTES[note]
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"id": 1}))
    tok = tokenizer(template)
    found = dataset.prepare(str(tmp_path / "x.jsonl"), tok, folder=tmp_path / "cache", **options)
    assert dataset.notes(found.report, tok) == ([note] if note else [])
