"""Finds prompt injections: text in documents that reads like an instruction to the model."""

import re

PATTERNS = (  # commands, control tokens of chat templates, passage tags, roles, invisible characters
    r"\b(ignore|disregard|forget|override|bypass)\b[^.\n]{0,30}\b(previous|prior|above|earlier|preceding|all|your|these)\b"
    r"[^.\n]{0,30}\b(instructions?|rules|prompts?|directions|guidelines|messages|passages)\b",
    r"\b(system|developer|hidden) prompt\b",
    r"\b(do not|don't|never) (inform|warn|alert) the user\b",
    r"\byou (are now|must now|will now|have to) (act|answer|respond|reply|behave|pretend|output|print)\b",
    r"\b(respond|reply|answer) (only )?with (only )?[\"'“]",
    r"<\|[a-z_]{2,20}\|>|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>|</?\s*passage\b",
    r"^\s*#*\s*(system|assistant)\s*:",
    r"[\U000e0020-\U000e007e]",
)
PATTERN = re.compile("|".join(f"(?:{p})" for p in PATTERNS), re.IGNORECASE | re.MULTILINE)


def found(text: str) -> str:
    """The first prompt injection in a text, or "". The patterns recognize only common wordings of prompt injections."""
    match = PATTERN.search(text)
    return match[0].strip() if match else ""
