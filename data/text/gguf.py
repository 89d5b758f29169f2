"""Reads the tokenizer in the header of a GGUF file as llama.cpp does, including files written by early conversion
scripts."""

from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

from common.errors import UserError, warn
from common.gguf_header import read_header
from data.text import pieces
from data.text.pieces import CONTROL, NORMAL
from data.text.splits import ADD_BOS, NFC, SPLITS, WHOLE_WORDS
from data.text.tokenizer import TURN_ENDS, NoTokenizer, Tokenizer

KEY = "tokenizer.ggml."


def from_gguf(path: Path) -> Tokenizer:
    """Reads the tokenizer in a GGUF file. The tokenizer's model is byte-level BPE ("gpt2"), SentencePiece BPE ("llama")
    or unigram ("t5")."""
    header = read_header(path).metadata
    meta = {name.removeprefix(KEY): value for name, value in header.items() if name.startswith(KEY)}
    if not meta.get("tokens"):
        raise NoTokenizer("this GGUF file has no tokenizer", str(path))
    if meta.get("model") not in ("gpt2", "llama", "t5"):
        raise UserError(f"unknown tokenizer model {meta.get('model')!r}", str(path), "supported: gpt2, llama and t5")
    _repair(meta, str(path))
    core = _byte_level(meta, str(path)) if meta["model"] == "gpt2" else _sentencepiece(meta)
    bos, eos = meta.get("bos_token_id"), meta.get("eos_token_id")
    adds = bool(meta.get("add_bos_token", meta["model"] == "llama" or meta.get("pre") in ADD_BOS))
    prefix = (bos,) if adds and bos is not None else ()
    if prefix:
        name = core.id_to_token(bos)
        core.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])
    return Tokenizer(
        core,
        bos=bos,
        eos=eos,
        pad=meta.get("padding_token_id"),
        prefix=prefix,
        chat_template=header.get("tokenizer.chat_template"),
        tool_template=header.get("tokenizer.chat_template.tool_use"),
        extra_eos=[meta[name] for name in ("eot_token_id", "eom_token_id") if name in meta],
    )


def _repair(meta: dict, where: str) -> None:
    """Repairs the errors in a tokenizer's metadata that llama.cpp repairs or warns about: missing lists, empty names,
    ids out of range, and control tokens that are marked as text."""
    tokens = meta["tokens"] = [token or f"[EMPTY_{i}]" for i, token in enumerate(meta["tokens"])]
    if len(set(tokens)) < len(tokens):
        raise UserError("two tokens of the vocabulary have the same text", where)
    types = meta["token_type"] = list(meta.get("token_type") or [NORMAL] * len(tokens))
    meta["scores"] = meta.get("scores") or [0.0] * len(tokens)
    if min(len(types), len(meta["scores"])) < len(tokens):
        raise UserError("fewer scores or types than tokens", where)
    for name in [name for name in meta if name.endswith("_token_id")]:
        if not 0 <= meta[name] < len(tokens):
            warn("%s: %s=%d is ignored: the vocabulary has %d tokens", where, name, meta.pop(name), len(tokens))
    if meta["model"] == "llama":
        for name, i in (("bos", 1), ("eos", 2)):
            meta.setdefault(f"{name}_token_id", i)
    ids = {meta[name] for name in meta if name.endswith("_token_id") and name != "unknown_token_id"}
    for i in {i for i, token in enumerate(tokens) if token in TURN_ENDS} | ids:
        if types[i] in (NORMAL, 0):
            types[i] = CONTROL


def _byte_level(meta: dict, where: str) -> Core:
    if "merges" not in meta:
        raise UserError("this GGUF file has no merges, which its vocabulary needs", where)
    pre = meta.get("pre")
    if pre is None:
        warn("%s: no tokenizer.ggml.pre: text is split by llama.cpp's default, maybe not as in training", where)
        pre = "default"
    if pre not in SPLITS:
        fix = f"use the model's tokenizer.json; known: {', '.join(SPLITS)}"
        raise UserError(f"unknown tokenizer.ggml.pre {pre!r}", where, fix)
    merges = [(merge[:cut], merge[cut + 1 :]) for merge in meta["merges"] if (cut := merge.find(" ", 1)) > 0]
    vocab = {token: i for i, token in enumerate(meta["tokens"])}
    core = Core(models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if pre in NFC:
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    pieces.add_tokens(core, meta["tokens"], meta["token_type"])
    return core


def _sentencepiece(meta: dict) -> Core:
    return pieces.sentencepiece_core(
        meta["tokens"],
        meta["scores"],
        meta["token_type"],
        bpe=meta["model"] == "llama",
        dummy_prefix=bool(meta.get("add_space_prefix", True)),
        squeeze=bool(meta.get("remove_extra_whitespaces", False)),
        charsmap=bytes(x & 255 for x in meta.get("precompiled_charsmap", [])),
    )
