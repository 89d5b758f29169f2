"""Converts text to token ids and back. Whatever its file format, a tokenizer is converted to a `tokenizers.Tokenizer`
plus the ids of a few special tokens."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from common.errors import UserError, panics_unprinted, reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Core

# The default chat template, for models without one. It writes only plain headings and the end token, which any
# vocabulary can encode.
DEFAULT_TEMPLATE = (
    "{% for m in messages %}{{ '### ' ~ m['role'] ~ '\\n' ~ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
# Tokens that end a turn in the chat templates of known model families. Such a token ends an answer only if the
# tokenizer's own chat template contains it.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|eot|>")


class NoTokenizer(UserError):
    """Raised when the files of a model contain no tokenizer."""


class Absent:
    """Stands in for the tokenizer of a model that has none. The model still works with token ids, but any use of the
    tokenizer raises UserError."""

    def __init__(self, error: NoTokenizer):
        self.error = error

    def __getattr__(self, name: str) -> NoReturn:
        raise UserError(str(self.error), "text needs a tokenizer", 'name one: load(..., tokenizer="...")')


class Tokenizer:
    """A tokenizer with the ids of its special tokens. `encode` adds neither BOS nor EOS. By default, `encode` treats
    text that spells a control token as plain text."""

    def __init__(
        self,
        core: "Core",
        *,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
        prefix: tuple[int, ...] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
        extra_eos: Iterable[int] = (),
    ):
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True
        self.core = core
        self.bos_id, self.eos_id, self.pad_id = bos, eos, pad
        self.prefix = prefix  # token ids with which every document starts, usually BOS
        self.chat_template = chat_template
        self.tool_template = tool_template  # chat template for chats with tools, if the model has a separate one
        self.extra_eos = tuple(extra_eos)
        self.reads_control = False  # whether text that spells a control token is always read as that token
        self._lock = threading.Lock()

    @property
    def add_bos(self) -> bool:
        return self.bos_id is not None and self.bos_id in self.prefix

    @cached_property
    def vocab_size(self) -> int:
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special(self) -> dict[str, int]:
        """{text: id} of the control tokens."""
        added = self.core.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @cached_property
    def _special_pattern(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")

    def control_tokens(self, text: str) -> list[str]:
        """The control tokens whose names occur in a text."""
        return self._special_pattern.findall(text)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer: EOS, further tokens that the model's files name, and the token that
        ends a turn in the chat template."""
        template = self.chat_template or ""
        ends = [self.special[t] for t in TURN_ENDS if t in self.special and t in template]
        first = [] if self.eos_id is None else [self.eos_id]
        return tuple(dict.fromkeys([*first, *self.extra_eos, *ends]))

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: list[str], special: bool = False) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode(texts, special, offsets=False)]

    def encode_inputs(self, texts: list[str], longest: int) -> list[list[int]]:
        """Token ids for an encoder model, including the special tokens that the tokenizer puts around a text. A text of
        more than `longest` tokens loses its last tokens."""
        with self._lock:
            self.core.enable_truncation(longest)
            self.core.encode_special_tokens = True
            try:
                return [encoding.ids for encoding in self.core.encode_batch_fast(texts, add_special_tokens=True)]
            except TypeError:
                raise UserError("the text has a lone surrogate, which is not a valid character", "text") from None
            finally:
                self.core.no_truncation()

    def encode_offsets(self, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the token ids of `text`, and for each id the span of characters in `text` that the token covers."""
        encoding = self._encode([text], special)[0]
        return encoding.ids, encoding.offsets

    def _encode(self, texts: list[str], special: bool, offsets: bool = True) -> list:
        special = special or self.reads_control
        core = self.core if special else self._plain
        with self._lock:  # the core is shared, so only one thread at a time may change this setting
            core.encode_special_tokens = not special
            try:
                with reading("text"), panics_unprinted:  # patterns and normalizers may come from hostile files
                    return (core.encode_batch if offsets else core.encode_batch_fast)(texts, add_special_tokens=False)
            except UserError as error:
                if isinstance(error.__cause__, TypeError):
                    raise UserError("the text has a lone surrogate, which is not a valid character", "text") from None
                raise
            finally:
                core.encode_special_tokens = True

    @cached_property
    def _plain(self) -> "Core":
        """The version of `core` that reads the names of control tokens as plain text. Only a unigram model needs a
        changed version, because it would find these names in its vocabulary, where they have the best score. The
        changed version replaces them in the vocabulary, and gives the names of byte tokens the worst score."""
        from tokenizers import Tokenizer as Core
        from tokenizers import models

        if not isinstance(self.core.model, models.Unigram):
            return self.core
        text = self.core.to_str()
        core, model = Core.from_str(text), json.loads(text)["model"]
        worst = 8 * min(score for _, score in model["vocab"])
        names = {f"<0x{byte:02X}>" for byte in range(256)} if model["byte_fallback"] else set()
        vocab = [(f"\0{t}" if t in self.special else t, worst if t in names else score) for t, score in model["vocab"]]
        core.model = models.Unigram(vocab, unk_id=model["unk_id"], byte_fallback=model["byte_fallback"])
        return core

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        with reading("tokens"):
            return self.core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, prompt: Iterable[int] = (), skip_special: bool = True) -> Callable[[int], str]:
        """Returns a function that takes the next token id of an answer to `prompt`, and returns the text that this id
        adds. The bytes of an incomplete character are held back.

        The prompt is needed because some decoders strip the leading space of a text. Without the prompt, the answer
        would lose its leading space.
        """
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(list(prompt), skip_special)

        def step(token: int) -> str:
            with reading("tokens"):
                return decoder.step(self.core, int(token)) or ""

        return step

    def token_bytes(self, ids):
        """The number of UTF-8 bytes of a token, or of each token in an array, as int32. Control tokens have 0 bytes."""
        return self.byte_lengths[ids]

    def spelled(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, which may be only a part of a character. For a control token, returns the bytes
        of its name."""
        text = self.core.id_to_token(token) or ""
        if text in self._added:
            return text.encode()
        if self._byte_level:
            return bytes(self._byte_of[char] for char in text)
        if len(text) == 6 and text.startswith("<0x"):
            return bytes.fromhex(text[3:5])
        return text.replace("\u2581", " ").encode()

    @cached_property
    def _added(self) -> set[str]:
        return {token.content for token in self.core.get_added_tokens_decoder().values()}

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        from data.text.formats import byte_characters

        return {char: byte for byte, char in enumerate(byte_characters())}

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self.core.to_str())["decoder"])

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self.core.get_vocab(with_added_tokens=True).items():
            if token in self.special:
                continue
            if token in self._added:
                lengths[i] = len(token.encode())
            elif self._byte_level:  # one printable character stands for one byte
                lengths[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("\u2581", " ").encode())
        return lengths

    @cached_property
    def _core_digest(self) -> str:
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """A hash of everything that affects token ids and rendered chats. It does not depend on where the tokenizer was
        loaded from."""
        template = self.chat_template or DEFAULT_TEMPLATE
        prefix = self.add_bos if self.prefix in ((), (self.bos_id,)) else self.prefix
        ids = [self.bos_id, self.eos_id, self.pad_id, prefix, self.extra_eos]
        parts = [self._core_digest, ids, template, *([self.tool_template] if self.tool_template else [])]
        parts += ["reads control tokens"] if self.reads_control else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer to files. Loading the files with `load`, or with `AutoTokenizer` of transformers, gives
        a tokenizer with the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.core.save(str(folder / "tokenizer.json"))
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        names = {key: self.core.id_to_token(i) for key, i in ids.items() if i is not None}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **({"add_bos_token": self.add_bos} if self.prefix in ((), (self.bos_id,)) else {}),
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "extra_eos_ids": list(self.extra_eos),
            **names,
        }
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
            config["chat_template"] = self.chat_template
        if self.tool_template is not None:
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            (folder / "additional_chat_templates/tool_use.jinja").write_text(self.tool_template, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2, ensure_ascii=False), "utf-8")
