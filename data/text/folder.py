"""Reads the tokenizer of a Hugging Face folder from the vocabulary and the other files that define the tokenizer."""

import importlib
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

from common import files
from common.errors import UserError, warn
from data.text import gguf, pieces
from data.text.splits import QWEN2
from data.text.tokenizer import NoTokenizer, Tokenizer

MAX_FILE = 256 << 20  # maximum size of one tokenizer file, in bytes
MAX_GAP = 4096  # maximum number of unused ids before the id of an added token
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# The control tokens of each tokenizer class, for folders that have no tokenizer.json and do not name control tokens.
GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}
BERT = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
CLASSES = {"GPT2": GPT2, "Qwen2": {"eos_token": "<|endoftext|>"}, "Llama": LLAMA, "": LLAMA}
CLASSES |= {"CodeLlama": LLAMA | {"add_bos_token": True}, "Gemma": GEMMA}
CLASSES |= {"Bert": BERT, "DistilBert": BERT, "Electra": BERT}
FILES = ("*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json", "added_tokens.json", "tokenizer*")


def from_folder(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a model folder, or of a run folder, which has its tokenizer in the subfolder
    tokenizer/."""
    if (folder / "tokenizer" / "tokenizer.json").is_file():
        folder = folder / "tokenizer"
    names = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    kind = str(names.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    core = _core(folder, kind, names)
    if core is None:
        ggufs = sorted(folder.glob("*.gguf"))
        if len(ggufs) == 1 and not _vocabularies(folder):
            return gguf.from_gguf(ggufs[0])
        core, names = _by_transformers(folder, kind, names)
    elif not (folder / "tokenizer.json").is_file():
        names = {**CLASSES[kind], **names}
    return _finished(core, folder, names)


def _finished(core: Core, folder: Path, names: dict) -> Tokenizer:
    size, last = core.get_vocab_size(), max(core.get_vocab().values(), default=0)
    if last > size + MAX_GAP:
        raise UserError(f"the vocabulary has {size:,} tokens, but one of them has the id {last:,}", str(folder))
    core.no_truncation()
    core.no_padding()
    _add_tokens(core, folder, names)
    ids = {key: _token_id(core, names.get(f"{key}_token")) for key in ("bos", "eos", "pad")}
    templates = _chat_templates(folder, names.get("chat_template"))
    return Tokenizer(
        core,
        **ids,
        prefix=_prefix(core, folder, names, ids["bos"]),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        extra_eos=[i for i in _ends(folder, names) if i != ids["eos"]],
    )


# ---- the vocabulary ----


def _core(folder: Path, kind: str, names: dict) -> Core | None:
    """Reads the vocabulary of a folder. Returns None if this module does not support the kind of vocabulary."""
    if (folder / "tokenizer.json").is_file():
        text = _read(folder / "tokenizer.json")
        try:
            core = Core.from_str(text)
        except Exception as error:  # the Rust library raises a bare Exception
            raise UserError(f"the tokenizers library cannot read it: {error}", str(folder / "tokenizer.json")) from None
        if isinstance(core.model, models.Unigram):
            core.model = _unigram(files.strict(text)["model"])
        return core
    if kind not in CLASSES:
        return None
    if (path := folder / "tokenizer.model").is_file():
        return _sentencepiece(path, kind, names)
    if kind in ("GPT2", "Qwen2") and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level(folder, kind, names)
    if CLASSES[kind] is BERT and (folder / "vocab.txt").is_file():
        return _word_piece(folder, names)
    return None


def _unigram(model: dict) -> models.Unigram:
    """Builds a unigram model with exactly the scores in the file. The Rust library's own reader changes the last digits
    of scores, which would break ties differently."""
    vocab = [(token, score) for token, score in model["vocab"]]
    return models.Unigram(vocab, unk_id=model["unk_id"], byte_fallback=bool(model.get("byte_fallback")))


def _sentencepiece(path: Path, kind: str, names: dict) -> Core | None:
    """Reads a SentencePiece file in the same way as the tokenizer class that the folder names. Llama's class inserts a
    space before the text and, if the folder sets `legacy`, also after every control token."""
    renamed = {int(i): _content(token) for i, token in (names.get("added_tokens_decoder") or {}).items()}
    try:
        core = pieces.sentencepiece(path.read_bytes(), str(path), renamed)
    except UserError:
        if b" " in path.read_bytes()[:64]:  # the file is a list of base64 texts and ranks, as tiktoken writes
            return None
        raise
    if kind.endswith("Llama"):
        spaced = names.get("add_prefix_space") is not False
        scheme = ("always" if names.get("legacy") else "first") if spaced else "never"
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        core.decoder = pieces.sentencepiece_decoder(spaced)
    return core


def _byte_level(folder: Path, kind: str, names: dict) -> Core:
    lines = _read(folder / "merges.txt").split("\n")
    merges = [tuple(line.split(" ", 1)) for line in lines if " " in line and not line.startswith("#version")]
    spaced = bool(names.get("add_prefix_space"))
    try:
        core = Core(models.BPE(_read_json(folder / "vocab.json"), merges))
    except Exception as error:
        raise UserError(f"vocab.json and merges.txt do not belong together: {error}", str(folder)) from None
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=True)
    if kind == "Qwen2":
        split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(spaced, use_regex=False)])
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    return core


def _word_piece(folder: Path, names: dict) -> Core:
    names = {**BERT, **names}
    words = _read(folder / "vocab.txt").splitlines()
    core = Core(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token=_content(names["unk_token"])))
    core.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=names.get("tokenize_chinese_chars", True),
        strip_accents=names.get("strip_accents"),
        lowercase=names.get("do_lower_case", True),
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    ends = [(name, core.token_to_id(name)) for name in (_content(names["cls_token"]), _content(names["sep_token"]))]
    if all(i is not None for _, i in ends):
        core.post_processor = processors.TemplateProcessing(f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    return core


def _by_transformers(folder: Path, kind: str, names: dict) -> tuple[Core, dict]:
    """Loads a tokenizer that only the library transformers can read. No code in the folder is run."""
    found = _vocabularies(folder)
    if not found:
        raise NoTokenizer("no tokenizer.json, tokenizer.model, vocabulary or single .gguf in this folder", str(folder))
    what = f"the tokenizer in {', '.join(found)}" + f" (class {kind}Tokenizer)" * bool(kind)
    try:
        auto = importlib.import_module("transformers").AutoTokenizer
    except ImportError:
        fix = "pip install transformers, or add the tokenizer.json that its save_pretrained writes"
        raise UserError(f"{what} can only be read by transformers, which is not installed", str(folder), fix) from None
    try:
        theirs = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        core = theirs.backend_tokenizer
    except Exception as error:  # transformers can raise any type of error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} cannot be read, not even by transformers: {reason}", str(folder)) from None
    return core, names | {key: str(token) for key, token in theirs.special_tokens_map.items() if isinstance(token, str)}


def _vocabularies(folder: Path) -> list[str]:
    """The names of the files in a folder that may contain a vocabulary."""
    return sorted({path.name for name in FILES for path in folder.glob(name)} - {"tokenizer_config.json"})


# ---- the other files ----


def _add_tokens(core: Core, folder: Path, names: dict) -> None:
    """Adds the tokens that the vocabulary lacks, in the order of their ids, and marks control tokens as such."""
    at = {int(i): token for i, token in (names.get("added_tokens_decoder") or {}).items() if str(i).isdigit()}
    for content, i in _read_json(folder / "added_tokens.json").items():
        if isinstance(i, int):
            at.setdefault(i, {"content": content})
    there = {token.content: token for token in core.get_added_tokens_decoder().values()}
    wanted = {}
    for i in sorted(at):
        token = _added(at[i], bool(isinstance(at[i], dict) and at[i].get("special")))
        if token.content and repr(there.get(token.content)) != repr(token):
            wanted |= {filler.content: filler for filler in _fillers(core, wanted, token.content, i, str(folder))}
            wanted[token.content] = token
    size = core.get_vocab_size()
    for key, token in _named(names):
        content = _content(token)
        before = wanted.get(content) or there.get(content)
        if before is None and core.token_to_id(content) is None:
            new = size + sum(core.token_to_id(known) is None for known in wanted)
            what = "%s: %s %r is not in the vocabulary: it gets the new id %d, on which no model was trained"
            warn(what, folder, key, content, new)
        if before is None or not before.special:
            flags = {flag: getattr(before, flag) for flag in FLAGS} if before else {}
            wanted[content] = AddedToken(content, special=True, **flags) if before else _added(token, special=True)
    core.add_tokens(list(wanted.values()))
    for i, content in ((i, _content(token)) for i, token in at.items()):
        if content and core.token_to_id(content) != i:
            what = "%s: token %r has two ids: %d, which is outside the vocabulary, and %d, which is inside and is used"
            warn(what, folder, content, i, core.token_to_id(content))


def _named(names: dict) -> list[tuple[str, object]]:
    """Lists (key, token) for every control token that tokenizer_config.json or special_tokens_map.json names."""
    found = [(f"{key}_token", names.get(f"{key}_token")) for key in NAMES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = names.get(key)
        more = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
        found += [(key, token) for token in more]
    return [(key, token) for key, token in found if _content(token)]


def _fillers(core: Core, wanted: dict, content: str, i: int, where: str) -> list[AddedToken]:
    """Placeholder tokens for the unused ids between the end of the vocabulary and the id of a new token."""
    end = core.get_vocab_size() + sum(core.token_to_id(known) is None for known in wanted)
    if core.token_to_id(content) is not None or content in wanted or i <= end:
        return []
    if i - end > MAX_GAP:
        raise UserError(f"token {content!r} has id {i}, but the vocabulary ends at {end - 1}", where)
    return [AddedToken(f"<|no token {j}|>", special=True) for j in range(end, i)]


def _added(token: object, special: bool) -> AddedToken:
    flags = token if isinstance(token, dict) else {}
    flags = {flag: bool(flags.get(flag)) for flag in FLAGS} | {"normalized": bool(flags.get("normalized", not special))}
    return AddedToken(_content(token), special=special, **flags)


def _content(token: object) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _token_id(core: Core, token: object) -> int | None:
    return core.token_to_id(_content(token)) if _content(token) else None


def _prefix(core: Core, folder: Path, names: dict, bos: int | None) -> tuple[int, ...]:
    """The token ids that are put before every text. As in transformers, the post-processor in tokenizer.json defines
    them. The flag add_bos_token is used only for folders without tokenizer.json and for folders that this project
    wrote."""
    flags = [names.get(key) for key in ("add_bos_token", "add_eos_token")]
    flagged, written = any(isinstance(flag, bool) for flag in flags), (folder / "tokenizer.json").is_file()
    flagged_prefix = (bos,) if flags[0] and bos is not None else ()
    if flagged and not written:
        name = core.id_to_token(bos) if flagged_prefix else ""
        core.post_processor = (
            processors.TemplateProcessing(f"{name} $A", special_tokens=[(name, bos)]) if name else None
        )
    if flagged and (not written or "extra_eos_ids" in names):
        return flagged_prefix
    plain, whole = (core.encode("a", add_special_tokens=special).ids for special in (False, True))
    prefix = tuple(whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)])
    if isinstance(flags[0], bool) and bos is not None and flags[0] != (bos in prefix):
        what = (
            "%s: add_bos_token is %s, but the post-processor of tokenizer.json adds %s; the post-processor is followed"
        )
        warn(what, folder, flags[0], "BOS" if bos in prefix else "none")
    return prefix


def _chat_templates(folder: Path, named: object) -> dict[str, str]:
    """Reads the chat templates of a folder as {"default": ..., "tool_use": ...}. Template files override
    tokenizer_config.json, as in transformers."""
    named = _read_json(folder / "chat_template.json").get("chat_template", named)
    if isinstance(named, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        named = {each.get("name"): each.get("template") for each in named if isinstance(each, dict)}
    found = named if isinstance(named, dict) else {"default": named}
    found |= {path.stem: _read(path) for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _read(folder / "chat_template.jinja")
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _ends(folder: Path, names: dict) -> list[int]:
    """The ids of the tokens that end an answer in addition to EOS, as listed in tokenizer_config.json and
    generation_config.json."""
    said = [names.get("extra_eos_ids"), _read_json(folder / "generation_config.json").get("eos_token_id")]
    ids = [i for value in said for i in (value if isinstance(value, list) else [value])]
    return [i for i in ids if type(i) is int and 0 <= i < 2**31]


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
        value = files.strict(_read(path))
    except ValueError as error:
        raise UserError(f"not JSON ({error})", str(path)) from None
    return value if isinstance(value, dict) else {}
