"""Loads tokenizers by name, defines the byte tokenizer, and trains tokenizers on text."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers

from common.errors import UserError, reading
from common.packages import locate
from data.text.folder import from_folder
from data.text.gguf import from_gguf
from data.text.pieces import from_sentencepiece
from data.text.tokenizer import Tokenizer

# Name patterns of the files to download from a repository on the Hugging Face hub.
FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*chat_template*", "generation_config.json")
FILES += ("config.json", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")


def load(spec: str | Path, texts: Callable[[], Iterable[str]] | None = None) -> Tokenizer:
    """Loads the tokenizer that `spec` names.

    `spec` is one of these: "bytes", a folder or its tokenizer.json, file.model (SentencePiece), file.gguf, the name of
    a packaged model, a hub id, or "bpe:SIZE" or "spm:SIZE" for a tokenizer that is trained on `texts()`.
    """
    spec = str(spec)
    kind, _, size = spec.partition(":")
    if spec == "bytes":
        return byte_tokenizer()
    if kind in ("bpe", "spm") and size:
        if not size.isdigit():
            raise UserError("the size of a vocabulary must be a whole number", spec, f"for example {kind}:2048")
        if texts is None:
            raise UserError("this tokenizer must be trained, but there is no text", spec, "name a saved tokenizer")
        return TRAINERS[kind](texts(), int(size))
    path = locate(spec, FILES)
    with reading(path):
        if path.suffix == ".gguf":
            return from_gguf(path)
        if path.suffix == ".model":
            return from_sentencepiece(path.read_bytes(), str(path))
        return from_folder(path.parent if path.suffix == ".json" else path)


# ---- bytes and trained vocabularies ----


class ByteTokenizer(Tokenizer):
    """A tokenizer whose ids are bytes. It gives the same ids as `core`, but skips the search for merges, because a
    vocabulary of bytes has none."""

    def encode_batch(self, texts: list[str], special: bool = False) -> list[list[int]]:
        if special or self.reads_control:
            return super().encode_batch(texts, special)
        return [list(text.encode()) for text in texts]


def byte_tokenizer() -> Tokenizer:
    """Makes a tokenizer whose ids 0 to 255 are the bytes of UTF-8. The ids 256 to 258 are BOS, EOS and padding."""
    core = Core(models.BPE({char: byte for byte, char in enumerate(byte_characters())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    return ByteTokenizer(core, bos=256, eos=257, pad=258)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE that splits numbers into single digits. The same texts always give the same vocabulary."""
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
    """Trains a SentencePiece tokenizer with byte fallback, so that any text can be encoded."""
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
            hard_vocab_limit=False,  # a small text may give a smaller vocabulary
            num_threads=1,  # with more threads, the vocabulary would be different
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"SentencePiece could not train: {error}", f"spm:{vocab_size}") from None
    return model.getvalue()


TRAINERS = {"bpe": train_bpe, "spm": train_sentencepiece}


def byte_characters() -> list[str]:
    """The printable character that represents each byte in byte-level BPE, as in GPT-2."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def _digits():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)])
