"""Files that are either old or new, never half written; and the copy on disk of a run that lives in an object store."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from common import paths

LOCK = "LOCK"  # this one and those of train.keep.lease stay where they are
MIRRORS = Path("~/.cache/kungfu/runs")


def write(path: Any, text: str) -> None:
    """Replaces `path` by `text`, on disk or in the store when this returns."""
    if paths.remote(path):
        path.write_text(text)
        return
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def sync(folder: Path) -> None:
    """Makes renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(folder: Any) -> None:
    """Deletes a folder, as far as it can be."""
    if not paths.remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rmtree()


def mirror(home: Any) -> Path:
    """Where this machine keeps the small files of a run in a store, since a store cannot append to them."""
    return MIRRORS.expanduser() / hashlib.sha256(str(home).encode()).hexdigest()[:16]


def fetch(home: Any, folder: Path) -> None:
    """Makes `folder` hold what a run in a store holds, but for its checkpoints and its locks."""
    for old in folder.iterdir():
        if old.name != LOCK:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in paths.sizes(home):
        if not name.startswith(("ckpt/", LOCK)) and ".." not in name.split("/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((home / name).read_bytes())


def put(folder: Path, home: Any, known: dict[str, tuple[int, int]]) -> None:
    """Copies the files that changed since they were `known`, by size and time, to a run in a store."""
    for name, size in paths.sizes(folder).items():
        stamp = (size, (folder / name).stat().st_mtime_ns)
        if name != LOCK and known.get(name) != stamp:
            (home / name).write_bytes((folder / name).read_bytes())
            known[name] = stamp
