"""Handles local paths, and paths in an object store such as gs://BUCKET/FOLDER. For the latter, etils has a class that
behaves like pathlib.Path.

An object store writes each object atomically, but objects cannot be appended to, renamed or locked.
"""

import contextlib
import difflib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from etils import epath
    from fsspec import AbstractFileSystem
    from typing_extensions import TypeIs

    Place = Path | epath.Path  # a path on this machine, or in an object store
else:
    Place = Path

STORE = "gs://"


def parse(name: str | Place) -> Place:
    """Converts a name to an epath.Path if it begins with gs://, and otherwise to a Path. Raises UserError for any other
    URL scheme, and if gcsfs is not installed."""
    text = str(name)
    if "://" not in text:
        return Path(name)
    if not text.startswith(STORE):
        raise UserError("this kind of URL is not supported", text, "use a local path, or gs://BUCKET/FOLDER")
    store()
    from etils import epath

    return epath.Path(text)


def remote(path: Place) -> "TypeIs[epath.Path]":
    return not isinstance(path, Path)


def store() -> "AbstractFileSystem":
    """The fsspec file system for gs://. It does not cache folder listings, because other hosts may write to the same
    bucket."""
    import fsspec

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        # etils uses the same arguments, so fsspec returns the same instance to both.
        return fsspec.filesystem("gcs", finalize_on_close=True)
    except ImportError as e:
        raise UserError(f"not installed: {e}", STORE, "pip install -r requirements/cloud.txt") from e


def sizes(folder: Place) -> dict[str, int]:
    """Maps the relative path of every file below a folder to the file's size in bytes."""
    if not remote(folder):
        return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    found, root = store().find(str(folder), detail=True), str(folder).removeprefix(STORE).rstrip("/") + "/"
    return {name.removeprefix(root): info["size"] for name, info in found.items() if name.startswith(root)}


def regular(place: Path) -> Path:
    """Returns `place`. Raises UserError if `place` is, or contains, a pipe or a device, because reading from one might
    never end."""
    for path in [place, *(place.iterdir() if place.is_dir() else ())]:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError("this is neither a file nor a folder", str(path), "remove it, or use another path")
    return place


def nearest(path: Place, otherwise: str = "") -> str:
    """Suggests "did you mean X?" for a path that does not exist, where X is the path with the most similar name in the
    same folder. Returns `otherwise` if no name is similar."""
    if remote(path) or not path.parent.is_dir():
        return otherwise
    names = [p.name for p in itertools.islice(path.parent.iterdir(), 10_000)]
    found = difflib.get_close_matches(path.name, names, 1, 0.75)
    return f"did you mean {path.with_name(found[0])}?" if found else otherwise


def create(path: Place, text: str) -> bool:
    """Creates an object in a store, and returns True, or returns False if the object already exists. If several
    processes write the same object at once, only one of them succeeds."""
    try:
        store().pipe_file(str(path), text.encode(), mode="create")
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def store_errors(place: Place) -> Iterator[None]:
    """A context manager that turns any error of an object store's client into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if not remote(place):
            raise
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise UserError(reason, str(place), "check the bucket's name and this machine's access to it") from e
