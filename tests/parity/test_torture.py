"""Ids and texts of tokenizers are transformers' on every line of tests/cases/torture.py, from folders and from GGUF."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as cut

transformers = pytest.importorskip("transformers")

from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2  # noqa: E402

from data.text import formats, splits  # noqa: E402
from data.text.pieces import CONTROL, NORMAL  # noqa: E402
from tests.cases import torture  # noqa: E402

pytestmark = pytest.mark.parity
LINES = torture.lines()
SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
BPE, UNIGRAM = "bpe", "unigram"
PRE = {"llama 3": "llama-bpe", "qwen 2": "qwen2", "gpt-2": "gpt-2", "deepseek 3": "deepseek-v3", "smollm": "smollm"}
PRE |= {"deepseek coder": "deepseek-coder", "gpt-4o": "gpt-4o", "mistral": "tekken"}


def byte_level(name: str) -> Tokenizer:
    """Trained on these lines, which are cut as the named `tokenizer.ggml.pre` says."""
    core = Tokenizer(models.BPE(ignore_merges=name in splits.WHOLE_WORDS))
    cuts = [cut.Split(Regex(pattern), "isolated") for pattern in splits.SPLITS[name]]
    core.pre_tokenizer = cut.Sequence([*cuts, cut.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    if name in splits.NFC:
        core.normalizer = normalizers.NFC()
    alphabet = sorted(cut.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if name == "llama-bpe":
        bos = SPECIAL[0], core.token_to_id(SPECIAL[0])
        core.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    return core


def sentencepiece(kind: str, path: Path, **options: object) -> bytes:
    """A model with byte fallback; its own normaliser leaves the text as it is, unless `options` name another."""
    texts = [part for line in LINES for part in line.split("\n") if part.strip() and max(map(ord, part)) < 0x600]
    (path / "lines.txt").write_text("\n".join(text for text in texts if "\0" not in text), "utf-8")
    base = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    base |= {"model_type": kind, "vocab_size": 2500, "hard_vocab_limit": False, "character_coverage": 0.995}
    base |= {"minloglevel": 2, "num_threads": 1, "split_digits": True}
    SentencePieceTrainer.train(input=path / "lines.txt", model_prefix=path / "m", **base | options)
    return (path / "m.model").read_bytes()


def word_piece(path: Path, **config: object) -> Path:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=config.get("do_lower_case", True))
    core.pre_tokenizer = cut.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=3000, special_tokens=special))
    words = core.get_vocab()
    (path / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(words, key=words.get)), "utf-8")
    return configured(path, "BertTokenizer", **config)


def configured(path: Path, kind: str, **config: object) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **config}))
    return path


def fast(path: Path, name: str) -> Path:
    core = byte_level(name)
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>").save_pretrained(path)
    return path


def slow_byte_level(path: Path, name: str, kind: str) -> Path:
    core = byte_level(name)
    model = json.loads(core.to_str())["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    added = {str(core.token_to_id(token)): {"content": token, "special": True} for token in SPECIAL}
    return configured(path, kind, eos_token="<|im_end|>", added_tokens_decoder=added)


def slow(path: Path, kind: str, model: str, file: str = "tokenizer.model", options: dict | None = None, **config):
    (path / file).write_bytes(sentencepiece(model, path, **options or {}))
    return configured(path, kind, **config)


def unigram(path: Path) -> Path:
    """As a tokenizer.json of any class, with byte fallback, which transformers' T5 ignores."""
    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece(UNIGRAM, path))
    pieces = [(piece.piece, round(piece.score, 6)) for piece in model.pieces]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = cut.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(path)
    return path


def saved(path: Path, make: Callable[[Path], Path]) -> Path:
    """The folder that transformers writes of the one that it has read."""
    (path / "read").mkdir()
    transformers.AutoTokenizer.from_pretrained(make(path / "read")).save_pretrained(path / "saved")
    return path / "saved"


GEMMA = {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
GEMMA |= {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "user_defined_symbols": ["<mask>"]}
NFKC = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
T5 = NFKC | {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
READ = {
    "qwen 2, slow": lambda path: slow_byte_level(path, "qwen2", "Qwen2Tokenizer"),
    "gpt-2, slow": lambda path: slow_byte_level(path, "gpt-2", "GPT2Tokenizer"),
    "llama": lambda path: slow(path, "LlamaTokenizer", BPE),
    "llama, legacy": lambda path: slow(path, "LlamaTokenizer", BPE, legacy=True, add_bos_token=True),
    "llama, no space": lambda path: slow(path, "LlamaTokenizer", BPE, add_prefix_space=False),
    "code llama": lambda path: slow(path, "CodeLlamaTokenizer", BPE),
    "gemma": lambda path: slow(path, "GemmaTokenizer", BPE, options=GEMMA),
    "t5": lambda path: slow(path, "T5Tokenizer", UNIGRAM, "spiece.model", T5),
    "t5 without bytes": lambda path: slow(path, "T5Tokenizer", UNIGRAM, "spiece.model", T5 | {"byte_fallback": False}),
    "xlm-r": lambda path: slow(path, "XLMRobertaTokenizer", UNIGRAM, "sentencepiece.bpe.model", NFKC),
    "bert": lambda path: word_piece(path),
    "bert, cased": lambda path: word_piece(path, do_lower_case=False),
    "bert, accents": lambda path: word_piece(path, strip_accents=False, tokenize_chinese_chars=False),
}
FOLDERS = {name: functools.partial(fast, name=pre) for name, pre in PRE.items()} | READ
FOLDERS |= {f"{name}, saved": functools.partial(saved, make=make) for name, make in READ.items()}
del FOLDERS["llama, legacy, saved"]  # transformers writes "always" in tokenizer.json, and reads it back as "first"
FOLDERS["unigram with bytes"] = lambda path: unigram(path)


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name, tmp_path):
    folder = FOLDERS[name](tmp_path)
    compare(transformers.AutoTokenizer.from_pretrained(folder), formats.load(folder))


def test_llama_2_as_written_by_transformers_4(tmp_path):
    """Its file prepends a space to every text; transformers 5 reads another rule into the class, and we the file."""
    core = transformers.AutoTokenizer.from_pretrained(READ["llama"](tmp_path)).backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = None
    core.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), unk_token="<unk>")
    compare(theirs, formats.load(tmp_path))


@pytest.mark.parametrize("name", PRE)
def test_byte_level_gguf(name, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(fast(tmp_path, PRE[name]))
    model, words = json.loads((tmp_path / "tokenizer.json").read_text())["model"], theirs.get_vocab()
    tokens = sorted(words, key=words.get)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE[name])
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    if name == "llama 3":
        writer.add_bos_token_id(theirs.bos_token_id or words[SPECIAL[0]])
    compare(theirs, formats.load(written(writer, tmp_path / "m.gguf")))


@pytest.mark.parametrize("kind, name", [("llama", "llama"), ("t5", "unigram with bytes")])
def test_sentencepiece_gguf(kind, name, tmp_path):
    folder = FOLDERS[name](tmp_path)
    model = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "m.model").read_bytes())
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_add_bos_token(False)
    compare(transformers.AutoTokenizer.from_pretrained(folder), formats.load(written(writer, tmp_path / "m.gguf")))


def written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def compare(theirs, ours) -> None:
    """Ids, with control tokens read and not; the text of them, at once and token by token; what texts begin with."""
    read = theirs(LINES, add_special_tokens=False).input_ids
    apart = theirs(LINES, add_special_tokens=False, split_special_tokens=True).input_ids
    have, left = ours.encode_batch(LINES, special=True), ours.encode_batch(LINES)
    if isinstance(ours.core.model, models.Unigram):  # transformers' finds names of tokens in what is only text
        # Of runs several cuts are best, and of those the last digit of a sum chooses.
        names = [re.findall(r"<0x..>|(.)\1\1", line) or ours.control_tokens(line) for line in LINES]
        apart = [mine if found else want for found, mine, want in zip(names, left, apart, strict=True)]
        assert not {i for ids in left for i in ids} & {*ours.special.values()} - {ours.special["<unk>"]}
    assert differing(read, have) == []
    assert differing(apart, left) == []
    for skip in (False, True):
        said = theirs.batch_decode(read, skip_special_tokens=skip)
        assert differing(said, [ours.decode(ids, skip) for ids in read]) == []
    for ids in read[::5]:
        step = ours.stream(skip_special=False)
        said, whole = "".join(map(step, ids)), ours.decode(ids)
        assert said == whole or whole.endswith("\ufffd")
    whole = theirs("a b").input_ids
    bare = theirs("a b", add_special_tokens=False).input_ids
    assert whole[: len(whole) - len(bare)][: len(ours.prefix)] == [*ours.prefix] and whole[0] in (*ours.prefix, bare[0])


def differing(want: list, have: list) -> list:
    return [found for found in zip(LINES, want, have, strict=True) if list(found[1]) != list(found[2])][:3]
