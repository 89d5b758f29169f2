"""Plain English in docstrings, comments, messages, help, pages and Markdown: without the habits that stop readers.

Only words are tested; whether a sentence is clear at first sight, only a reader can judge.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "CONTRIBUTING.md", "README.md", "common", "configs", "data", "docs", "evals", "examples", "feedback",
    "infer", "kernels",
    "model", "results", "tools", "train",
)  # fmt: skip
SUFFIXES = (".py", ".md", ".j2", ".toml")

UNITS = "bytes|bits|nats|tokens|rows|rates?|seconds?|ms|us|GB|MB|FLOPs|batches|examples|words|products|sizes?"
PER = "token|device|step|row|batch|second|weight|chip|cycle|week|column|page|call|byte|group|turn|chip-hour"
AMERICAN = "uanti|okeni|itiali|ormali|timi|eriali|teriali|ectori|tili|ecogni|ummari|ynchroni|riori|inali|emori"
BRITISH = "colour|behaviour|favour|centre|metres?\\b|neighbour|labelled|labelling|cancelled|learnt|artefact"
HABITS = {
    r"\b(un)?told\b|\btells?\b": "says, reports, shows",
    r"\b(lies?|lay)\b": "is stored, is placed, is sharded",
    r"\bfor ever\b": "forever",
    r"(?<!--)\balone\b": "only X",
    rf"\b({UNITS}) an? ({PER})s?\b": "per",
    r"\bcomputed here\b": "not supported",
    r"(?<!here )\b(is|are|was) no (?!longer\b|more\b|less\b|different\b)": "is not a",
    r"\bat hand\b|\bmend(s|ed|ing)?\b|\bheld against\b": "plain words",
    r"\b(goes|go|went|going) on\b": "continues, resumes",
    rf"\b\w*({AMERICAN})s(e|ed|es|er|ers|ing|ation|able)\b": "-ize",
    rf"\b({BRITISH})": "American spelling",
    r"^What (?!does|is|are)(?!.*\?)": "a subject, not 'What ...'",
    r"\b(makes|make) of (?!sure)": "a plain verb",
    r"\bso many (bytes|rows|tokens)\b": "that many",
}
# Where such a word is right: a term, a name, a quotation.
RIGHT = ("format labelled", "aria-labelledby")


def words(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a person reads in a file; code in backticks and command lines left out."""
    source = path.read_text("utf-8")
    if path.suffix == ".py":
        yield from _of_python(source)
    elif path.suffix == ".toml":
        yield from ((i, line.partition("#")[2]) for i, line in enumerate(source.splitlines(), 1) if "#" in line)
    else:
        code = r"(?ms)^```.*?^```|^ {4,}[^\n]*|\{[%{#].*?[%}#]\}"
        source = re.sub(code, lambda m: re.sub(r"[^\n]+", "", m[0]), source)
        yield from enumerate(source.splitlines(), 1)


def _of_python(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    tree = ast.parse(source)
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in ast.walk(node) if isinstance(part, ast.Constant)}
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def found(path: Path) -> Iterator[str]:
    for line, text in words(path):
        if " " not in text.strip():
            continue  # a name, a pattern
        text = re.sub(r"`[^`]*`|\"[^\"\s]*\"", "``", text)
        for phrase in RIGHT:
            text = text.replace(phrase, "")
        for pattern, better in HABITS.items():
            for match in re.finditer(pattern, text):
                at = line + text.count("\n", 0, match.start())
                around = " ".join(text[max(match.start() - 40, 0) : match.end() + 30].split())
                yield f"{path.relative_to(ROOT)}:{at}: {match[0]!r} in {around!r}; write {better}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_plain_english(folder):
    paths = sorted(p for p in [ROOT / folder, *(ROOT / folder).rglob("*")] if p.suffix in SUFFIXES)
    problems = [line for path in paths for line in found(path)]
    assert not problems, "\n" + "\n".join(problems)


def test_errors_name_their_subject():
    """UserError("exists", path) reads well only beside the path."""
    bare = r"(is|has|holds|exists|needs|takes|was|does|starts|started|looks)\b"
    problems = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                    text = ast.unparse(node.args[0]).lstrip("f").strip("'\"") if node.args else ""
                    if re.match(bare, text):
                        problems.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    assert not problems, "\n" + "\n".join(problems)
