"""A bucket at gs://: a folder on disk behind etils and fsspec."""

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from fsspec.registry import _registry

from common import files


class Whole(LocalFileOpener):
    """A file that is there once it is closed."""

    def close(self):
        if not self.closed:
            self.commit()

    def __exit__(self, *_):
        self.close()


class Objects(LocalFileSystem):
    def _open(self, path, mode="rb", block_size=None, **kwargs):
        if mode != "wb":
            return super()._open(path, mode, block_size, **kwargs)
        self.makedirs(self._parent(path), exist_ok=True)
        return Whole(self._strip_protocol(path), mode, autocommit=False, fs=self)


class Bucket(DirFileSystem):
    """A folder as gs://; like a store it makes folders as needed, creates an object once, never shows half of it."""

    cachable, root = False, ""

    def __init__(self, **_):
        super().__init__(self.root, Objects(auto_mkdir=True))

    def _join(self, path):
        strip = lambda p: p.removeprefix("gs://").rstrip("/")
        return super()._join(strip(path) if isinstance(path, str) else list(map(strip, path)))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket, which is tmp_path/store/bucket."""
    Bucket.root = str(tmp_path / "store")
    monkeypatch.setitem(_registry, "gcs", Bucket)
    monkeypatch.setattr(files, "MIRRORS", tmp_path / "mirrors")
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield tmp_path / "store" / "bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()
