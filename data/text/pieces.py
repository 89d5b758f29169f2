"""Builds a `tokenizers.Tokenizer` from a SentencePiece model, which is stored in a .model file, or as lists in a GGUF
header."""

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

from common.errors import UserError
from data.text.tokenizer import Tokenizer

LONGEST = 1024  # maximum characters of a piece; the time to read a piece grows with the square of its length
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces


def from_sentencepiece(model: bytes, where: str) -> Tokenizer:
    """Makes a tokenizer from a single .model file, with the control tokens that the file names, and without a chat
    template."""
    core = sentencepiece(model, where)
    ids = {key: core.token_to_id(name) for key, name in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    return Tokenizer(core, **ids)


def sentencepiece(model: bytes, where: str, renamed: dict[int, str] | None = None) -> Core:
    """Builds the `tokenizers.Tokenizer` for a .model file. `renamed` maps the ids of pieces to new names."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    read = proto.ModelProto()
    try:
        read.ParseFromString(model)
    except DecodeError:
        read.Clear()
    if not read.pieces:
        raise UserError("not a SentencePiece model", where)
    tokens = [(renamed or {}).get(i) or piece.piece for i, piece in enumerate(read.pieces)]
    if len(set(tokens)) < len(tokens):
        raise UserError("two pieces of the vocabulary have the same text", where)
    return sentencepiece_core(
        tokens,
        [piece.score for piece in read.pieces],
        [piece.type for piece in read.pieces],
        bpe=read.trainer_spec.model_type == proto.TrainerSpec.BPE,
        dummy_prefix=read.normalizer_spec.add_dummy_prefix,
        squeeze=read.normalizer_spec.remove_extra_whitespaces,
        charsmap=read.normalizer_spec.precompiled_charsmap,
    )


def sentencepiece_core(tokens, scores, types, *, bpe, dummy_prefix, squeeze, charsmap) -> Core:
    """Builds a tokenizer that gives the same ids as SentencePiece, except that text with leading whitespace gets no
    dummy prefix (as in transformers)."""
    unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), None)
    byte_fallback = BYTE in types
    if bpe:
        vocab = {token: i for i, token in enumerate(tokens)}
        unk = None if unknown is None else tokens[unknown]
        merges = _merges(vocab, scores, types)
        core = Core(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback))
    else:
        rounded = [round(score, 6) for score in scores]  # the JSON reader does not preserve more digits
        core = Core(models.Unigram(list(zip(tokens, rounded)), unk_id=unknown, byte_fallback=byte_fallback))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")] if squeeze else []
    if steps:
        core.normalizer = normalizers.Sequence(steps)
    prepend = "first" if dummy_prefix else "never"
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    core.decoder = sentencepiece_decoder(dummy_prefix)
    add_tokens(core, tokens, types)
    return core


def sentencepiece_decoder(dummy_prefix: bool) -> decoders.Decoder:
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    return decoders.Sequence(steps)


def add_tokens(core: Core, tokens: list[str], types: list[int]) -> None:
    """Registers the control and user-defined pieces, which are matched before the rest of a text is split."""
    kinds = list(zip(tokens, types))
    special = [AddedToken(t, special=True, normalized=False) for t, k in kinds if k in (CONTROL, UNKNOWN)]
    core.add_special_tokens(special)
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in kinds if k == USER_DEFINED])


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Computes the BPE merges, which SentencePiece does not store. Every split of a piece into two other pieces is a
    merge. The merges are sorted by the scores of the merged pieces, with the best score first."""
    found = []
    for token, i in vocab.items():
        if types[i] not in (NORMAL, USER_DEFINED) or len(token) < 2:
            continue
        if len(token) > LONGEST:
            raise ValueError(f"a piece has {len(token):,} characters, but at most {LONGEST:,} are supported")
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]
