"""Lets a language model write a question and an answer about a chunk of a document, with three examples in the prompt.

The method is self-instruct (Wang et al. 2023, arXiv 2212.10560), applied to documents instead of instructions.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import files
from evals.run import flops_per_token
from infer.lm import LM
from infer.retrieve.chunks import Chunk

BATCH = 16  # answers are saved after this many chunks; an interrupted command resumes after the last saved batch
LENGTH = 64  # maximum number of new tokens
ORDER = "Write one question that the passage answers, and its short answer, copied from the passage."
EXAMPLES = (
    ("Accordion\nThe accordion is a box-shaped musical instrument. It was invented in Berlin in 1822.",
     "Question: Where was the accordion invented?\nAnswer: Berlin"),
    ("Marie Curie\nMarie Curie was a physicist and chemist who conducted pioneering research on radioactivity.",
     "Question: What did Marie Curie conduct pioneering research on?\nAnswer: radioactivity"),
    ("Lake Baikal\nLake Baikal is a rift lake in Russia. Its maximum depth is 5,387 feet.",
     "Question: How deep is Lake Baikal?\nAnswer: 5,387 feet"),
)  # fmt: skip
FORM = re.compile(r"\s*Question:\s*(.+?)\s*\n\s*Answer:\s*(.*?)\s*(?:\n|$)")


class Written(NamedTuple):
    rows: list[tuple[str, str]]  # (question, answer) per chunk; ("", "") if the model's text is not in that form
    flops: float  # FLOPs that this call spent; texts saved by earlier calls are not counted


def write(lm: LM, chunks: Sequence[Chunk], parts: Path) -> Written:
    """Writes a question and its answer for each chunk, by greedy decoding. Saves the model's texts in the folder
    `parts`, and reuses those saved by an earlier call."""
    rows, flops = [], 0.0
    for at in range(0, len(chunks), BATCH):
        block = chunks[at : at + BATCH]
        prompts = [prompt(lm, chunk) for chunk in block]
        key = hashlib.sha256(json.dumps([prompts, LENGTH, lm.tokenizer.fingerprint]).encode()).hexdigest()[:24]
        if not (said := files.read_json(parts / f"{key}.json").get("said")):
            said = lm.generate(prompts, max_new_tokens=LENGTH)
            flops += flops_per_token(lm) * sum(len(lm.encode(p)) + LENGTH for p in prompts)
            parts.mkdir(parents=True, exist_ok=True)
            files.write_json(parts / f"{key}.json", {"said": said})
        rows += [found.groups() if (found := FORM.match(text)) else ("", "") for text in said]
    return Written(rows, flops)


def prompt(lm: LM, chunk: Chunk) -> str | list[dict]:
    if lm.tokenizer.chat_template is None:
        before = "\n\n".join(f"Passage: {passage}\n{said}" for passage, said in EXAMPLES)
        return f"{ORDER}\n\n{before}\n\nPassage: {chunk.passage}\n"
    turns = [{"role": "system", "content": ORDER}]
    for passage, said in EXAMPLES:
        turns += [{"role": "user", "content": passage}, {"role": "assistant", "content": said}]
    return [*turns, {"role": "user", "content": chunk.passage}]
