"""Converts a tokenizer to the metadata of a GGUF file, which llama.cpp and data/text/gguf.py can read."""

import json

from common.errors import UserError
from common.types import Json
from data.text.gguf import KEY
from data.text.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from data.text.splits import GPT2, NFC, SPLITS, WHOLE_WORDS
from data.text.tokenizer import Tokenizer


def metadata(tokenizer: Tokenizer, size: int) -> Json:
    """Returns the metadata {key: value} of a tokenizer, for a model whose embedding has `size` rows. Raises UserError
    for a tokenizer that GGUF cannot represent."""
    core = json.loads(tokenizer.core.to_str())
    model = core["model"]
    if model["type"] != "BPE":
        raise UserError(f"a tokenizer of type {model['type']} cannot be written as GGUF", "export", "--format=hf")
    names = {i: token for token, i in tokenizer.core.get_vocab(with_added_tokens=True).items()}
    special, added = set(tokenizer.special), {t["content"] for t in core["added_tokens"]}
    kinds = [_kind(names.get(i), special, added, model.get("unk_token")) for i in range(size)]
    out = {
        "tokens": [names.get(i, f"[PAD{i}]") for i in range(size)],
        "token_type": kinds,
        "add_bos_token": tokenizer.add_bos,
        **{f"{name}_token_id": i for name, i in _ids(tokenizer).items() if i is not None},
    }
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if "ByteLevel" in json.dumps(core["decoder"]):
        out |= {"model": "gpt2", "pre": _pre(core), "merges": [" ".join(pair) for pair in pairs]}
    else:
        rank = {}
        for i, (a, b) in enumerate(pairs):
            rank.setdefault(a + b, i)
        before = json.dumps([core["normalizer"], core["pre_tokenizer"]])
        spaces = "Prepend" in before or '"first"' in before or '"always"' in before
        scores = [-float(rank.get(token, len(pairs))) for token in out["tokens"]]
        out |= {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": spaces}
    found = {KEY + name: value for name, value in out.items()}
    templates = {"": tokenizer.chat_template, ".tool_use": tokenizer.tool_template}
    return found | {f"tokenizer.chat_template{name}": text for name, text in templates.items() if text}


def _ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    others = [i for i in tokenizer.eos_ids if i != tokenizer.eos_id]
    return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id} | (
        {"eot": others[0]} if others else {}
    )


def _kind(token: str | None, special: set[str], added: set[str], unknown: str | None) -> int:
    if token is None:
        return UNUSED
    if token == unknown:
        return UNKNOWN
    if token in added:
        return CONTROL if token in special else USER_DEFINED
    return BYTE if len(token) == 6 and token.startswith("<0x") else NORMAL


def _pre(core: dict) -> str:
    """The name in GGUF for the way a tokenizer splits text."""
    steps = core["pre_tokenizer"] or {}
    patterns = []
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "Split":
            patterns.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits":
            patterns.append(r"\p{N}")
        elif step.get("type") == "ByteLevel" and step.get("use_regex", True):
            patterns.append(GPT2)
    whole, composed = bool(core["model"].get("ignore_merges")), "NFC" in json.dumps(core["normalizer"])
    for name, known in SPLITS.items():
        if list(known) == patterns and (name in WHOLE_WORDS) == whole and (name in NFC) == composed:
            return name
    raise UserError("GGUF has no name for how this tokenizer splits text", "export", "--format=hf")
