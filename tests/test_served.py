"""What training saw is what is served: templates and system texts stay with runs, exports and adapters."""

import numpy as np

from data.rows.layout import painted
from data.text import chat, formats
from infer import models
from infer.lm import LM
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
