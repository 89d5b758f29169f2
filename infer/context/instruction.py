"""Provides variants of the instruction in the system message, either built in or read from a file."""

from pathlib import Path

from common.errors import UserError, reading
from infer.context.shots import Prompt

OWN = "{}"  # in a variant, this stands for the question's own instruction
BUILT_IN = (  # the first variant leaves the question unchanged
    "",
    "{} Answer with the answer only, without an explanation.",
    "{} Answer in as few words as possible.",
    "{} The answer is always in the form that the question asks for. Never add anything to it.",
    "You are an expert who answers precisely. {}",
    "{} If you are not sure, give the most likely answer.",
)
LONGEST = 10_000  # characters


def read(source: str) -> list[str]:
    """Reads the variants in a text file, one per line, or returns the built-in variants for "builtin". Raises UserError
    if the file has no variant."""
    if source == "builtin":
        return list(BUILT_IN)
    path = Path(source).expanduser()
    with reading(path):
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    found = list(dict.fromkeys("" if line == OWN else line for line in lines if line))
    if not found:
        raise UserError("the file has no instruction", source, "write one per line, or use --instructions=builtin")
    if long := [line for line in found if len(line) > LONGEST]:
        raise UserError(f"an instruction has {len(long[0]):,} characters, more than {LONGEST:,}", source)
    return found


def put(prompt: Prompt, variant: str) -> Prompt:
    """Puts a variant of the instruction into a prompt, as its system message. The variant "" leaves the prompt
    unchanged."""
    if not variant:
        return prompt
    if isinstance(prompt, str):
        return f"{variant.replace(OWN, '').strip()}\n\n{prompt}"
    first = 1 if prompt[0]["role"] == "system" else 0
    own = str(prompt[0]["content"]) if first else ""
    return [{"role": "system", "content": variant.replace(OWN, own).strip()}, *prompt[first:]]
