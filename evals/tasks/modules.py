"""The task is to choose the module of Python's standard library whose documentation contains a given sentence. There
are four options, so guessing is right in 25 % of cases.

The sentences are from the documentation of the installed Python, so scores with different Python versions are not
comparable.
"""

import functools
import importlib
import inspect
import random
import re
import zlib
from collections.abc import Iterator

from evals.task import Example, Task, by, chat

MODULES = [
    "ast", "asyncio", "base64", "bisect", "calendar", "collections", "csv", "datetime", "decimal", "difflib",
    "email", "fractions", "functools", "gzip", "heapq", "inspect", "ipaddress", "itertools", "json", "logging",
    "math", "pathlib", "pickle", "random", "re", "shutil", "socket", "sqlite3", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "time", "traceback", "unittest", "uuid", "weakref", "zipfile",
]  # fmt: skip
OPTIONS = 4
INSTRUCTION = "Name the module of Python's standard library that this documentation belongs to."


def task() -> Task:
    return Task(examples, chat(INSTRUCTION, lambda e: e["text"]), by("choice"), kind="choice", scorer="choice")


@functools.cache
def examples(split: str) -> list[Example]:
    out, seen = [], set()
    for name in MODULES:
        for text in first_lines(name):
            digest = zlib.crc32(text.encode())
            if text not in seen and (digest % 4 == 0) == (split == "heldout"):
                out.append({"text": text, "answer": name, "options": options(name, digest)})
            seen.add(text)
    return out


def options(answer: str, seed: int) -> tuple[str, ...]:
    """Returns the answer and three other modules, chosen and shuffled with the random seed `seed`."""
    rng = random.Random(seed)
    others = rng.sample([name for name in MODULES if name != answer], OPTIONS - 1)
    return tuple(rng.sample([answer, *others], OPTIONS))


def first_lines(name: str) -> Iterator[str]:
    """Yields the first lines of the docstrings of a module's functions, classes and methods, if they are sentences that
    do not name the module."""
    own = lambda x: getattr(x, "__module__", None) in (name, f"_{name}", None)
    module = importlib.import_module(name)
    for holder in [module, *(c for c in vars(module).values() if inspect.isclass(c) and own(c))]:
        for key, member in vars(holder).items():
            line = (inspect.getdoc(member) or "").partition("\n")[0]
            if key[0] == "_" or not callable(member) or not own(member):
                continue
            if 30 <= len(line) <= 120 and line.endswith(".") and not re.search(rf"\b{name}\b", line, re.I):
                yield line
