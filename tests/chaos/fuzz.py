"""Damages one real file of every kind that is read; each must be read, or be refused in one line.

    python -m tests.chaos.fuzz [--mutations=20000] [--seconds=7200] [--seed=0] [--only=model,gguf,...] [--at=N]

Mutation N of a seed is always the same (tests/chaos/mutations.py). It is read in a process forked from this one, which
has imported the readers and has no jax backend, and must end in success or one UserError within 5 s of CPU time and
1 GB above the start. Anything else is a finding; --at=N repeats it with its traceback. The exit code is then 1.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import contextlib
import csv
import gc
import gzip
import importlib.util
import json
import logging
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import load_file, save_file

import train.flow  # noqa: F401
from common import cli, exits, files, record
from common.errors import UserError, reading
from configs import schema
from data import dataset
from data.text import chat
from data.text import formats as tokenizers
from infer.models import Run
from model import build, weights
from model.io import peft_folder, saved
from model.io.pretrained import open_pretrained
from tests.chaos import mutations
from tools import export
from tools.report import data as report

SECONDS, BYTES = 5.0, 1 << 30  # CPU time of one mutation, and its memory above the start
PATIENCE = 60.0  # seconds of the clock, in which a hang shows
BATCH = 50  # mutations of a process, whose start costs as much as ten
OLD = Path(__file__).resolve().parents[1] / "fixtures" / "old"
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + eos_token }}{% if loop.last %}!{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "5"}]
ROWS = [
    {"messages": CHAT},
    {"prompt": "2+3=", "completion": "5"},
    {"text": "Some words, and more.", "n": 1},
    {"prompt": "2+3=", "chosen": "5", "rejected": "6"},
    {"instruction": "Add", "input": "2 3", "output": "5", "history": [["a", "b"]]},
    {"prompt": "Add", "answers": ["a", "b"], "ranks": [1, 2]},
    {"tokens": ["a", "b"], "tags": [0, 1]},
    {"messages": [*CHAT[:1], {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "add", "arguments": {"a": 2}}}]}], "tools": [{"name": "add", "parameters": {}}]},
]  # fmt: skip


class Kind(NamedTuple):
    """`read(root)` reads the example below `root`; `files` are those of its files that are damaged, as globs."""

    read: Callable[[Path], object]
    files: tuple[str, ...]
    weight: int = 4


# --- the examples ---


def examples(root: Path) -> None:
    """A model, whole and in shards, its run, GGUF file and adapter, a SentencePiece model, records in every format."""
    shutil.copytree(OLD, root, dirs_exist_ok=True)
    base, words = root / "base", ["the cat sat on the mat, a dog and a cat", "numbers 1 2 3", "words, and more of them"]
    tokenizers.load("bpe:300", lambda: words * 9).save(base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    os.chdir(root)  # the run names its base from there
    for argv in (["--from=base", "--to=m.gguf", "--format=gguf"], ["--from=run", "--to=adapter", "--adapter-only"]):
        if code := export.main(argv):
            os._exit(code)
    shape = files.plain(open_pretrained(str(base)).config.to_dict())
    shutil.copytree(root / "run", root / "whole")
    files.write_json(root / "whole" / "model.json", shape)
    shutil.copytree(base, root / "shards", ignore=lambda *_: ["model.safetensors"])
    tensors = load_file(base / "model.safetensors")
    names = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, root / "shards" / file)
    files.write_json(root / "shards" / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    (root / "tokenizer.model").write_bytes(tokenizers.sentencepiece_model(words * 9, 300, "bpe"))
    _records(root)


def _records(root: Path) -> None:
    text = "".join(files.json_line(row) for row in ROWS).encode()
    (root / "rows.jsonl").write_bytes(text)
    (root / "rows.json").write_bytes(json.dumps(ROWS).encode())
    (root / "rows.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))
    (root / "rows.jsonl.zst").write_bytes(pyarrow.compress(text, "zstd", asbytes=True))
    with (root / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerows([{"prompt": "2+3=", "completion": "5"}, {"prompt": 'a "b", c', "completion": "d\ne"}] * 5)
    when = pyarrow.array([1 << 40, None, 5] * 3, pyarrow.timestamp("us"))
    table = pyarrow.table({"text": ["some words", "more", "x"] * 3, "n": [1.5, None, 2] * 3, "when": when})
    pyarrow.parquet.write_table(table, root / "rows.parquet", use_dictionary=["text"])
    with pyarrow.ipc.new_stream(root / "rows.arrow", table.schema) as stream:
        stream.write_table(table)
    prepared(root / "rows.jsonl", root / "cache")


# --- the readers ---


def read_model(name: str) -> Callable[[Path], object]:
    def read(root: Path) -> None:
        opened = open_pretrained(str(root / name))
        specs = build.network(opened.config).specs
        opened.check(specs)
        weights.map_named(
            lambda path, spec: opened.stacked(path, tuple((0, n) for n in spec.shape)), specs, is_leaf=weights.is_spec
        )

    return read


def read_tokenizer(name: str) -> Callable[[Path], object]:
    def read(root: Path) -> None:
        found = tokenizers.load(root / name)
        ids = found.encode("Some words, a 12,345 and aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab \n\n  \u00e9\u4e2d <|eos|>")
        found.decode(ids, skip_special=True)
        _ = found.vocab_size, found.eos_ids, found.fingerprint, found.token_bytes(np.array(ids, int))
        chat.encode(CHAT, found)

    return read


def read_adapter(root: Path) -> None:
    with reading(root / "adapter"):  # as peft_read.read has it
        folder = peft_folder.Folder(root / "adapter")
        folder.keys()
    for name in folder.tensors:
        module = name.removeprefix(peft_folder.ROOT).split(".lora_")[0]
        folder.targets(module)
        folder.alpha(module)


def read_run(root: Path) -> None:
    """What `infer` asks of a run before its arrays, what a resume asks, and what a report does."""
    for name in ("run", "whole"):
        run = Run(root / name)
        for step in saved.steps(root / name / "ckpt"):
            with contextlib.suppress(saved.Damaged):  # an earlier step is taken
                saved.read_manifest(root / name / "ckpt" / str(step))
        run.__dict__["saved"] = saved.Saved(4, files.load_json(root / name / "config.json"), {}, {})
        _ = run.config.context
        record.read(root / name / "metrics.jsonl")
    seen = report.read(root / "run")
    _ = report.of_run(seen), report.seconds(seen), report.used([seen]), report.stored(seen.path), seen.done
    report.choices([seen])
    schema.read(str(root / "run"))


def read_arrays(root: Path) -> None:
    saved.load_params(root / "run", verified=False)


def read_rows(name: str) -> Callable[[Path], object]:
    def read(root: Path) -> None:
        with tempfile.TemporaryDirectory(dir=root) as work:
            prepared(root / name, Path(work))

    return read


def prepared(source: Path, cache: Path) -> None:
    made = dataset.prepare(str(source), tokenizers.byte_tokenizer(), folder=cache, max_bad=0.99)
    made.split(0.1)
    _ = made.lengths.sum(), made.stored.tokens[:9], made.stored.mask(np.arange(len(made.stored.tokens)))


KINDS = {
    "model": Kind(read_model("base"), ("base/config.json", "base/generation_config.json", "base/model.safetensors"), 8),
    "shards": Kind(read_model("shards"), ("shards/*.index.json", "shards/*.safetensors")),
    "tokenizer": Kind(
        read_tokenizer("base"),
        (
            "base/tokenizer.json",
            "base/tokenizer_config.json",
            "base/special_tokens_map.json",
            "base/generation_config.json",
        ),
        8,
    ),
    "template": Kind(read_tokenizer("base"), ("base/chat_template.jinja",)),
    "pieces": Kind(read_tokenizer("tokenizer.model"), ("tokenizer.model",)),
    "gguf": Kind(read_model("m.gguf"), ("m.gguf",), 8),
    "gguf_words": Kind(read_tokenizer("m.gguf"), ("m.gguf",)),
    "adapter": Kind(read_adapter, ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")),
    "run": Kind(
        read_run,
        (
            "run/config.json",
            "whole/model.json",
            "run/metrics.jsonl",
            "run/cost.json",
            "run/environment.json",
            "run/ckpt/4/state_hashes.json",
        ),
        8,
    ),
    "arrays": Kind(read_arrays, ("run/ckpt/4/*", "run/ckpt/4/state/*", "run/ckpt/4/state/d/*"), 1),
    "jsonl": Kind(read_rows("rows.jsonl"), ("rows.jsonl",)),
    "json": Kind(read_rows("rows.json"), ("rows.json",)),
    "cache": Kind(lambda root: prepared(root / "rows.jsonl", root / "cache"), ("cache/*/index.json",), 2),
    "csv": Kind(read_rows("rows.csv"), ("rows.csv",), 2),
    "parquet": Kind(read_rows("rows.parquet"), ("rows.parquet",)),
    "arrow": Kind(read_rows("rows.arrow"), ("rows.arrow",), 2),
    "packed": Kind(lambda root: [read_rows(f"rows.jsonl.{end}")(root) for end in ("gz", "zst")], ("rows.jsonl.*",), 2),
}


# --- mutations ---


class Ended(NamedTuple):
    """What came of a mutation: "read", "refused" or, for a finding, what is wrong."""

    how: str
    told: str
    seconds: float
    grown: int  # bytes

    @property
    def good(self) -> bool:
        return self.how in ("read", "refused")


def drawn(number: int, seed: int, root: Path, names: list[str]) -> tuple[str, Path, str, bytes]:
    """(kind, file, what is done to it, its new bytes) of a mutation."""
    r = random.Random(f"{seed} {number}")
    kind = r.choices(names, [KINDS[name].weight for name in names])[0]
    path = r.choice([p for glob in KINDS[kind].files for p in sorted(root.glob(glob)) if p.is_file()])
    return kind, path, *mutations.mutated(path, r)


def tried(number: int, seed: int, root: Path, names: list[str]) -> Ended:
    """Damages the file, reads the example, and mends the file."""
    kind, path, _, data = drawn(number, seed, root, names)
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        return ended(KINDS[kind].read, root)
    finally:
        path.write_bytes(whole)


def ended(read: Callable[[Path], object], root: Path) -> Ended:
    """Reads an example within this process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    began, before, how, told = _seconds(), _bytes("VmRSS"), "read", ""
    try:
        read(root)
    except UserError as error:
        how, told = "refused", str(error)
        lines = 1 + len(getattr(error, "problems", ()))  # a config has a line for each
        if len(told.strip().splitlines()) > lines or len(told) > 5000 * lines:
            how = "not one line"
        cause: BaseException | None = error
        while cause := cause.__cause__ or cause.__context__:
            how = "more than its memory" if isinstance(cause, MemoryError) else how
    except BaseException as error:
        how, told = type(error).__name__, traceback.format_exc()
    grown, seconds = _bytes("VmHWM") - before, _seconds() - began
    how = "more than its memory" if grown > BYTES else f"more than {SECONDS:g} s" if seconds > SECONDS else how
    return Ended(how, told, seconds, grown)


def _seconds() -> float:
    """CPU time of this process and of its children, which no other load on the machine changes."""
    spent = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in spent)


def _bytes(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) << 10


def worker(numbers: Iterable[int], seed: int, root: Path, names: list[str]) -> tuple[int, int]:
    """(process, pipe) of a forked process that tries these mutations and writes a line of JSON on each."""
    sys.stdout.flush()
    ours, theirs = os.pipe()
    if pid := os.fork():
        os.close(theirs)
        return pid, ours
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.disable()
    most = _bytes("VmSize") + BYTES + (1 << 30)  # what a thread only reserves counts here, too
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    os.chdir(root)
    with contextlib.suppress(BaseException):
        for number in numbers:
            line = json.dumps([number, *tried(number, seed, root, names)])
            os.write(theirs, line.encode() + b"\n")
    os._exit(0)


def results(numbers: list[int], seed: int, whole: Path, names: list[str], end: float) -> Iterator[tuple[int, Ended]]:
    """What came of each mutation, until the `end` of the time. Each process tries BATCH of them; what goes wrong there
    counts when it does in a process of its own."""
    at, root = 0, whole.with_name("damaged")
    while at < len(numbers) and time.monotonic() < end:
        _renewed(root, whole)
        done = 0
        for number, found in _heard(numbers[at : at + BATCH], seed, root, names):
            done += 1
            if not found.good:
                break
            yield number, found
        if not found.good:
            _renewed(root, whole)
            yield next(_heard([number], seed, root, names))
        at += done


def _renewed(root: Path, whole: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)


def _heard(numbers: list[int], seed: int, root: Path, names: list[str]) -> Iterator[tuple[int, Ended]]:
    """What a worker says, and last "died" when it ended too early, or a time limit when it did not in time."""
    pid, pipe = worker(numbers, seed, root, names)
    try:
        with open(pipe, "rb", buffering=0) as lines:  # `select` knows of no buffer
            for number in numbers:
                began, how = time.monotonic(), "died"
                if not select.select([lines], [], [], PATIENCE)[0]:
                    how = f"more than {PATIENCE:g} s"
                elif line := lines.readline():
                    yield number, Ended(*json.loads(line)[1:])
                    continue
                yield number, Ended(how, "", time.monotonic() - began, 0)
                return
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@cli.command
def main(argv: list[str]) -> int:
    parser = cli.Parser("tests.chaos.fuzz", __doc__)
    parser.add_argument("--mutations", type=cli.count, default=20_000)
    parser.add_argument("--seconds", type=cli.count, default=7200)
    parser.add_argument("--seed", type=cli.count, default=0)
    parser.add_argument("--only", type=cli.listed, default=list(KINDS))
    parser.add_argument("--at", type=cli.counts, default=None)
    args = parser.parse_args(argv)
    began, ends, slowest, largest = time.monotonic(), Counter(), 0.0, 0
    if importlib.util.find_spec("transformers"):  # imported here, and not within the 5 s of a tokenizer that needs it
        import transformers.models.auto.tokenization_auto  # noqa: F401
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "root"
        if not (pid := os.fork()):
            try:
                examples(root)
                for name, kind in KINDS.items():
                    assert (whole := ended(kind.read, root)).how == "read", (name, whole)
                os._exit(exits.DONE)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            return 1
        gc.freeze()
        numbers = args.at or list(range(args.mutations))
        for number, found in results(numbers, args.seed, root, args.only, began + args.seconds):
            kind, path, what, _ = drawn(number, args.seed, root, args.only)
            slowest, largest = max(slowest, found.seconds), max(largest, found.grown)
            ends[kind, found.how if found.good else "findings"] += 1
            if ends.total() % 1000 == 0:
                print(f"{ends.total()} mutations", flush=True)
            if not found.good or args.at:
                last = found.told.strip().split("\n")[-30 if args.at else -6 :]
                print(
                    f"{number} {kind}: {path.relative_to(root)}: {what}: {found.how}", *last, sep="\n    ", flush=True
                )
    for name in args.only:
        print(f"{name:>10}", *(f"{ends[name, how]:>6} {how}" for how in ("read", "refused", "findings")))
    count = sum(n for (_, how), n in ends.items() if how == "findings")
    spent = time.monotonic() - began
    print(
        f"{ends.total()} mutations in {spent:.0f} s, {count} findings; at most {slowest:.1f} s and {largest >> 20} MB"
    )
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
