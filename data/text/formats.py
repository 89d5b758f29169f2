"""Every tokenizer file we read, built into a `tokenizers.Tokenizer`: HF folders, GGUF, SentencePiece; and training."""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core

from common.errors import UserError
from common.gguf_header import read_header
from common.packages import locate
from data.text.tokenizer import Tokenizer

FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")  # fetched from the hub
MAX_FILE = 256 << 20  # bytes of one tokenizer file
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types of SentencePiece and GGUF
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# `tokenizer.ggml.pre` -> how text is cut before BPE. A wrong entry gives plausible but different ids, so no default.
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
PLAIN = ("gpt-2", "gpt2", "mpt", "olmo", "phi-2", "jais", "trillion")
SPLITS = {
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "dbrx": LLAMA3,
    "smaug-bpe": LLAMA3,
    "qwen2": QWEN2,
}


def load(spec: str | Path, texts: Callable[[], Iterable[str]] | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    spec: "bytes" | a folder or its tokenizer.json | file.model (SentencePiece) | file.gguf | a packaged model's name |
    a hub id | "bpe:SIZE" or "spm:SIZE", trained on `texts()`.
    """
    spec = str(spec)
    kind, _, size = spec.partition(":")
    if spec == "bytes":
        return byte_tokenizer()
    if kind in ("bpe", "spm") and size:
        if not size.isdigit():
            raise UserError("the size of a vocabulary is a whole number", spec, f"for example {kind}:2048")
        if texts is None:
            raise UserError("this tokenizer is trained on text, and none is at hand here", spec, "name a saved one")
        return TRAINERS[kind](texts(), int(size))
    path = locate(spec, FILES)
    if path.suffix == ".gguf":
        return from_gguf(path)
    if path.suffix == ".model":
        return from_sentencepiece(path.read_bytes(), str(path))
    return from_folder(path.parent if path.suffix == ".json" else path)


# ---- bytes and trained vocabularies ----


class ByteTokenizer(Tokenizer):
    """Same ids as its core, without the work of looking for merges that are not there."""

    def encode_batch(self, texts: list[str], special: bool = False) -> list[list[int]]:
        return super().encode_batch(texts, special) if special else [list(text.encode()) for text in texts]


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes of UTF-8; then BOS, EOS and padding."""
    core = Core(models.BPE({char: byte for byte, char in enumerate(byte_characters())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    return ByteTokenizer(core, bos=256, eos=257, pad=258)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with single digits; the same texts give the same vocabulary."""
    core = Core(models.BPE())
    core.pre_tokenizer = _digits()
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|pad|>"]
    if vocab_size < 256 + len(specials):
        raise UserError(f"a byte-level vocabulary needs at least {256 + len(specials)} entries", f"bpe:{vocab_size}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return Tokenizer(core, bos=0, eos=0, pad=1)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str = "unigram") -> Tokenizer:
    """A SentencePiece model with byte fallback, so that no text is unknown to it."""
    return from_sentencepiece(sentencepiece_model(texts, vocab_size, model_type), f"spm:{vocab_size}")


def sentencepiece_model(texts: Iterable[str], vocab_size: int, model_type: str = "unigram") -> bytes:
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],  # newlines are text, not the end of a sentence
            hard_vocab_limit=False,  # little text gives a smaller vocabulary
            num_threads=1,  # more threads make another vocabulary
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"SentencePiece could not train: {error}", f"spm:{vocab_size}") from None
    return model.getvalue()


TRAINERS = {"bpe": train_bpe, "spm": train_sentencepiece}


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def _digits():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)])


# ---- Hugging Face folders ----


def from_folder(folder: Path) -> Tokenizer:
    """tokenizer.json and the small files beside it; or tokenizer.model; or the tokenizer/ of a run."""
    if (folder / "tokenizer" / "tokenizer.json").is_file():
        folder = folder / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        return _from_folder_without_json(folder)
    try:
        core = Core.from_str(_read(folder / "tokenizer.json"))
    except Exception as error:  # the Rust side raises a bare Exception
        raise UserError(f"not a tokenizer this library reads: {error}", str(folder / "tokenizer.json")) from None
    names = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    ids = {key: _token_id(core, names.get(f"{key}_token")) for key in ("bos", "eos", "pad")}
    starts = core.encode("", add_special_tokens=True).ids[:1] == [ids["bos"]]
    return Tokenizer(
        core,
        **ids,
        add_bos=names["add_bos_token"] if isinstance(names.get("add_bos_token"), bool) else starts,
        chat_template=_chat_template(folder, names.get("chat_template")),
        extra_eos=[*names.get("extra_eos_ids", ()), *_generation_eos(folder, ids["eos"])],
    )


def _from_folder_without_json(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.model").is_file():
        return from_sentencepiece((folder / "tokenizer.model").read_bytes(), str(folder / "tokenizer.model"))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return from_gguf(ggufs[0])
    raise UserError("no tokenizer.json, tokenizer.model or single .gguf in this folder", str(folder))


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_FILE:
        raise UserError(f"larger than {MAX_FILE >> 20} MiB", str(path))
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error})", str(path)) from None


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", str(path)) from None
    return value if isinstance(value, dict) else {}


def _token_id(core: Core, token: object) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return core.token_to_id(content) if isinstance(content, str) else None


def _chat_template(folder: Path, named: object) -> str | None:
    """chat_template.jinja wins over chat_template.json and the config, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return _read(folder / "chat_template.jinja")
    named = _read_json(folder / "chat_template.json").get("chat_template", named)
    if isinstance(named, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        named = {entry["name"]: entry["template"] for entry in named}.get("default")
    return named if isinstance(named, str) else None


def _generation_eos(folder: Path, eos: int | None) -> list[int]:
    ids = _read_json(folder / "generation_config.json").get("eos_token_id", [])
    ids = ids if isinstance(ids, list) else [ids]
    return [i for i in ids if isinstance(i, int) and i != eos]


# ---- GGUF ----


def from_gguf(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF's header: byte-level BPE ("gpt2"), SentencePiece BPE ("llama") or unigram ("t5")."""
    header = read_header(path).metadata
    key = "tokenizer.ggml."
    meta = {name.removeprefix(key): value for name, value in header.items() if name.startswith(key)}
    if "tokens" not in meta:
        raise UserError("this GGUF carries no tokenizer", str(path))
    if meta.get("model") == "gpt2":
        core = _gguf_bpe(meta, str(path))
    elif meta.get("model") in ("llama", "t5"):
        core = _gguf_sentencepiece(meta)
    else:
        raise UserError(f"unknown tokenizer model {meta.get('model')!r}", str(path), "gpt2, llama and t5 are read")
    bos = meta.get("bos_token_id")
    add_bos = bool(meta.get("add_bos_token", meta["model"] == "llama"))
    if add_bos and bos is not None:
        name = core.id_to_token(bos)
        core.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])
    return Tokenizer(
        core,
        bos=bos,
        eos=meta.get("eos_token_id"),
        pad=meta.get("padding_token_id"),
        add_bos=add_bos,
        chat_template=header.get("tokenizer.chat_template"),
        extra_eos=[meta[name] for name in ("eot_token_id", "eom_token_id") if name in meta],
    )


def _gguf_bpe(meta: dict, where: str) -> Core:
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("merges", [])]
    pre = meta.get("pre", "gpt-2")
    vocab = {token: i for i, token in enumerate(meta["tokens"])}
    core = Core(models.BPE(vocab, merges, ignore_merges=SPLITS.get(pre) == LLAMA3))
    if pre in DIGITS:
        core.pre_tokenizer = _digits()
    elif pre in PLAIN:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif pre in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    else:
        known = ", ".join([*DIGITS, *PLAIN, *SPLITS])
        raise UserError(f"unknown tokenizer.ggml.pre {pre!r}", where, f"use the tokenizer.json instead; known: {known}")
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    _add_tokens(core, meta["tokens"], meta.get("token_type", []))
    return core


def _gguf_sentencepiece(meta: dict) -> Core:
    types = meta.get("token_type", [NORMAL] * len(meta["tokens"]))
    return _sentencepiece_core(
        meta["tokens"],
        meta["scores"],
        types,
        bpe=meta["model"] == "llama",
        dummy_prefix=bool(meta.get("add_space_prefix", True)),
        squeeze=bool(meta.get("remove_extra_whitespaces", False)),
        charsmap=bytes(x & 255 for x in meta.get("precompiled_charsmap", [])),
    )


def _add_tokens(core: Core, tokens: list[str], types: list[int]) -> None:
    """Registers control and user-defined pieces, which are matched before the model sees the text."""
    kinds = list(zip(tokens, types))
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in kinds if k == CONTROL])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in kinds if k == USER_DEFINED])


# ---- SentencePiece ----


def from_sentencepiece(model: bytes, where: str) -> Tokenizer:
    """A .model file."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        proto = ModelProto.FromString(model)
        tokens = [piece.piece for piece in proto.pieces]
    except (DecodeError, UnicodeDecodeError):
        raise UserError("not a SentencePiece model", where) from None
    if not (tokens and proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise UserError("not a SentencePiece model", where)
    normalizer = proto.normalizer_spec
    core = _sentencepiece_core(
        tokens,
        [piece.score for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
        bpe=proto.trainer_spec.model_type == proto.trainer_spec.BPE,
        dummy_prefix=normalizer.add_dummy_prefix,
        squeeze=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
    )
    ids = {key: core.token_to_id(name) for key, name in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    return Tokenizer(core, **ids)


def _sentencepiece_core(
    tokens: list[str],
    scores: list[float],
    types: list[int],
    *,
    bpe: bool,
    dummy_prefix: bool,
    squeeze: bool,
    charsmap: bytes,
) -> Core:
    """Ids equal SentencePiece's, but text that starts with whitespace gets no dummy prefix (as in transformers)."""
    unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), None)
    byte_fallback = BYTE in types
    if bpe:
        vocab = {token: i for i, token in enumerate(tokens)}
        unk = None if unknown is None else tokens[unknown]
        merges = _merges(vocab, scores, types)
        core = Core(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback))
    else:
        rounded = [round(score, 6) for score in scores]  # more digits do not survive the JSON reader
        core = Core(models.Unigram(list(zip(tokens, rounded)), unk_id=unknown, byte_fallback=byte_fallback))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")] if squeeze else []
    if steps:
        core.normalizer = normalizers.Sequence(steps)
    prepend = "first" if dummy_prefix else "never"
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(core, tokens, types)
    return core


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece stores no merges: every split of a piece into two pieces is one, best score first."""
    found = []
    for token, i in vocab.items():
        if types[i] not in (NORMAL, USER_DEFINED) or len(token) < 2:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]
