"""Writes docs/formats.md, the list of inputs that are read, refused or ignored, from the tables that the code uses.

python -m tools.formats
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from common import cli, files
from common.seen import Seen

PAGE = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
START = """\
# Which inputs are read, refused or ignored

`python -m tools.formats` writes this page from the tables that the code uses; a test checks that it is up to date.

The rule: no content of an input is ignored silently. It is used, or refused with a one-line message that names the fix,
or counted as unused in a one-line message. With the option `--strict` of `tools.prepare`, `tools.chat`, `tools.serve`
and `evals.main`, unused content is an error. Content that is known to be irrelevant, as listed below, is not counted.
"""
Rows = list[tuple[str, str]]


@cli.command
def main(argv: list[str]) -> int | None:
    cli.Parser("tools.formats", __doc__).parse_args(argv)
    files.write(PAGE, page())


def page() -> str:
    """The text of docs/formats.md."""
    parts = [START]
    for title, rows in {
        "Rows of training data": rows_of_data(),
        "Messages": messages(),
        "Files of training data": data_files(),
        "Checkpoints": checkpoints(),
        "PEFT adapters": adapters(),
        "Requests to the server": requests(),
    }.items():
        lines = [f"| {what} | {cell} |" for what, cell in [("what", "names"), ("---", "---"), *rows]]
        parts.append("\n".join([f"## {title}\n", *lines, ""]))
    return "\n".join(parts)


def names(found: Iterable[object]) -> str:
    return ", ".join("`" + str(name).replace("|", "\\|") + "`" for name in found if name != "")


def rows_of_data() -> Rows:
    from data import formats

    shapes = [(f"shape {name}", names(sorted(columns))) for name, columns in formats.SHAPES.items()]
    published = [(f"also read as shape {name}", names(columns.values())) for name, columns in formats.PUBLISHED]
    scored = [
        (f"format {form}", f"columns of a text or chat shape, and one of {names(columns)}")
        for form, columns in formats.SCORED.items()
    ]
    beside = {
        "system text": formats.SYSTEM, "input that belongs to an instruction": formats.GIVEN, "tools": formats.TOOLS,
        "prompt of a preference pair": formats.PROMPTS, "ranks of answers": formats.RANKS,
        "ratings of answers": formats.RATINGS, "text of a ranked answer": formats.ANSWER,
    }  # fmt: skip
    beside = [(f"also read: {what}", names(columns)) for what, columns in beside.items()]
    ignored = [("irrelevant columns", names(sorted(formats.IRRELEVANT))), ("counted as unused", "every other column")]
    return [*shapes, *published, *scored, *beside, *ignored]


def messages() -> Rows:
    from data import messages as turns

    roles = [(f"other names of role {role}", names(also.split())) for role, also in turns.ROLES.items()]
    return [
        *roles,
        ("types of text parts in a message's content", names(turns.TEXT)),
        ("reasoning text, in a message field or a content part", names(("reasoning_content", *turns.THOUGHT))),
        ("fields that are read or irrelevant", names(sorted(turns.IDLE))),
        ("other fields", "given to the chat template, and counted as unused if the template does not read them"),
        (
            "refused",
            "content of other types (images, audio), messages without a role or text, calls without a function",
        ),
    ]


def data_files() -> Rows:
    from data import files as readers
    from data import sources

    return [
        ("formats that are read, also compressed as `.gz` or `.zst`", names(readers.READERS)),
        (
            "sources other than local files",
            names([*sources.BUILT_IN, "hf:repo[:config][@split][#revision]", "gs://", "synthetic:"]),
        ),
        ("refused; save such files as CSV", names(sources.OFFICE)),
        ("irrelevant files, whose names start with", names(sources.COMPANIONS)),
        ("reported as not read", "every other file of a folder"),
    ]


def checkpoints() -> Rows:
    from model.families import llama
    from model.io import compressed, foreign, gguf, hf
    from model.io.pretrained import IGNORED, families, family

    fields = []
    for name in families():
        read = Seen({})  # every field has a default, as in transformers
        family(name).config(read)
        fields.append((f"config.json of {name}", names(sorted(read.used))))
    needs = [f"{kind} ({', '.join(needed)})" if needed else kind for kind, needed in llama.ROPES.items()]
    return [
        *fields,
        ("types of RoPE scaling, and the fields that they need", names(needs)),
        ("fields of rope_scaling", names(sorted(llama.ROPE_FIELDS))),
        ("activations", names(llama.ACTS)),
        (
            "irrelevant fields of config.json, unless the family reads them",
            names(sorted(hf.IRRELEVANT)),
        ),
        (
            "counted as unused",
            "every other field that has a value, and every unused tensor outside the model's layers",
        ),
        ("prefixes of tensor names", names(hf.BODIES)),
        ("irrelevant tensors", names([IGNORED.pattern])),
        ("types of tensors", names((*hf.DTYPES, *hf.CODES))),
        ("quantization methods", names(("bitsandbytes", "fp8", compressed.METHOD, *foreign.FORMS))),
        (f"formats of {compressed.METHOD}", names(compressed.FORMATS)),
        (
            "refused",
            "other quantization methods; pickles (the message shows how to convert them); missing files or tensors",
        ),
        ("irrelevant weight files", names([hf.QUIET.pattern])),
        ("architectures of GGUF files, also if split into several files", names(gguf.ARCHITECTURES)),
    ]


def adapters() -> Rows:
    from model.io import peft_folder as peft

    return [
        *((f"fields read for {kind}", names(sorted(used)) or "none") for kind, used in peft.USED.items()),
        ("irrelevant fields", names(sorted(peft.IRRELEVANT))),
        ("refused if set", names(sorted(peft.REFUSED)) + ", and every unknown field"),
        ("`init_lora_weights` that leaves the base weights unchanged", names(peft.DRAWN)),
        ("`init_lora_weights` that changes the base weights, which are then recomputed", names(peft.STARTS)),
        ("`init_lora_weights` that is refused; the message says how to fix it", names(peft.OTHERS)),
        ("counted as unused", "tensors of modules that the config does not name"),
    ]


def requests() -> Rows:
    from infer.serve import api, messages

    def fields(found: dict[str, api.Field]) -> str:
        return names(sorted({*found, *api.READ}))

    neutral = {name: " or ".join(map(json.dumps, values)) for name, values in api.NEUTRAL.items()}
    neutral = [f"`{name}` = {values}" if values else f"`{name}`" for name, values in neutral.items()]
    return [
        ("read by /v1/chat/completions", fields(api.CHAT) + ", `messages`"),
        ("read by /v1/completions", fields(api.COMPLETION) + ", `prompt`"),
        ("irrelevant", names(api.LABELS)),
        ("refused unless null or the value shown", ", ".join(neutral)),
        ("refused", "every other parameter"),
        ("roles of messages", names(sorted(messages.ROLES))),
        ("fields of messages", names(sorted(messages.FIELDS))),
        ("refused", "other fields of messages, and those that the model's chat template does not render"),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
