"""Builds and opens indexes. An index is a folder with the chunks of a source, their vectors, and a record of the
settings with which the index was built.

INDEX/index.json      The source, a hash of its content, the settings, the embedder and its digest; written last.
INDEX/chunks.jsonl    One chunk per line.
INDEX/vectors.npy     Vectors [chunks, width] in float16, normalized to length 1; absent without an embedder.
INDEX.parts/          Vectors of an unfinished build, which the next build reuses.
"""

import functools
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import files
from common.errors import UserError
from common.types import Json
from data import sources
from infer.embed import Embedder
from infer.embed import load as load_embedder
from infer.retrieve import chunks, injections, search
from infer.retrieve.chunks import Chunk
from infer.retrieve.search import How

RECORD, CHUNKS, VECTORS = "index.json", "chunks.jsonl", "vectors.npy"
PART = 512  # number of chunks whose vectors are saved at a time


class Hit(NamedTuple):
    chunk: Chunk
    score: float


class Index:
    """An opened index. Raises UserError if the folder is not an index, or if its files do not match each other."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not (self.folder / RECORD).is_file():
            raise UserError("there is no index here", str(folder), "make one: --documents=SOURCE; see --help")
        self.record = files.read_json(self.folder / RECORD)
        rows = files.read_lines(self.folder / CHUNKS)
        self.chunks = [Chunk(row["document"], row["title"], row["text"]) for row in rows]
        self.vectors: np.ndarray | None = None
        if self.record["embedder"]:
            self.vectors = np.load(self.folder / VECTORS, mmap_mode="r", allow_pickle=False)
        if len(self.chunks) != self.record["chunks"] or len(rows) != len(self.vectors if self.dense else rows):
            raise UserError("the files have different numbers of chunks", str(folder), "build it again")

    @property
    def dense(self) -> bool:
        return self.vectors is not None

    @functools.cached_property
    def words(self) -> search.Words:
        return search.Words([chunk.passage for chunk in self.chunks])

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The embedder that computed the vectors. Raises UserError if the weights of the embedder have changed."""
        found = load_embedder(self.record["embedder"])
        if digest(found) != self.record["digest"]:
            what = "the weights of the embedder have changed since it computed the vectors"
            raise UserError(what, self.record["embedder"], "build the index again")
        return found

    def search(
        self, questions: Sequence[str], k: int = 5, how: How | None = None, asked: np.ndarray | None = None
    ) -> list[list[Hit]]:
        """Finds the k best chunks for each question, best first. `asked` contains the vectors of the questions, if they
        are already computed.

        `how` is "bm25", "dense", or a fusion of the two: "rrf" or "mean". None means "mean" if the index has vectors,
        and "bm25" otherwise. With "bm25", chunks that share no word with the question are left out.
        """
        how = how or ("mean" if self.dense else "bm25")
        if how != "bm25" and not self.dense:
            raise UserError(
                f"the index has no vectors for {how!r} search", str(self.folder), "build it with --embedder"
            )
        if asked is None and how != "bm25":
            asked = self.embedder.embed(questions, "query")
        vectors = [None] * len(questions) if how == "bm25" else asked
        return [self._one(question, vector, k, how) for question, vector in zip(questions, vectors, strict=True)]

    def flops(self, questions: Iterable[str], how: How | None = None) -> float:
        """The FLOPs that `search` needs to embed the questions, and to multiply the vectors of the questions by the
        vectors of all chunks. The cost of BM25 is not counted."""
        if how == "bm25" or self.vectors is None:
            return 0.0
        asked = list(questions)
        return self._embedding_flops(asked) + 2.0 * len(asked) * self.vectors.size

    @property
    def build_flops(self) -> float:
        """The FLOPs that computing the vectors of all chunks takes."""
        return self._embedding_flops([chunk.passage for chunk in self.chunks]) if self.dense else 0.0

    def _embedding_flops(self, texts: Sequence[str]) -> float:
        return self.embedder.flops_per_token * sum(map(len, self.embedder.encode(texts)))

    def _one(self, question: str, vector: np.ndarray | None, k: int, how: How) -> list[Hit]:
        parts = [] if how == "dense" else [self.words.scores(question)]
        if self.vectors is not None and vector is not None:
            parts.append(search.cosines(self.vectors, vector))
        scores = parts[0] if len(parts) == 1 else search.fuse(parts, how)
        found = [Hit(self.chunks[i], float(scores[i])) for i in search.best(scores, k)]
        return [hit for hit in found if hit.score > 0] if how == "bm25" else found


def opened(folder: str | Path) -> Index:
    """Opens the index in a folder. The index is kept open for later calls until its files change."""
    record = Path(folder).expanduser() / RECORD
    return _opened(str(folder), record.stat().st_mtime_ns if record.is_file() else 0)


@functools.lru_cache(maxsize=4)
def _opened(folder: str, changed: int) -> Index:
    return Index(folder)


def digest(embedder: Embedder) -> str:
    """A hash of the vectors of three fixed texts. It changes if the embedder's weights, tokenizer or pooling change."""
    found = embedder.embed(["", "a", "The quick brown fox jumps over the lazy dog."])
    return hashlib.sha256(np.round(found, 3).astype(np.float32).tobytes()).hexdigest()[:16]


def content(documents: str) -> dict[str, str]:
    """Maps each source to an identifier that changes whenever the content of the source changes."""
    return {spec: sources.content_id(spec) for spec in sources.mixture(documents)}


def build(
    documents: str,
    folder: str | Path,
    embedder: str = "",
    words: int = chunks.WORDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    judge: Callable[[Index], None] = lambda new: None,
) -> Json:
    """Builds the index of a source, or updates an existing index. Returns the contents of INDEX/index.json.

    Vectors of unchanged chunks are reused, and an interrupted build continues where it stopped. `judge` checks the new
    index; if it raises an error, the old index is kept. Raises UserError if the folder exists but is not an index, or
    if the source has no text.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder / RECORD).is_file():
        raise UserError("the folder exists and is not an index", str(folder), "choose a new folder")
    found = list(dict.fromkeys(chunk for spec in sources.mixture(documents) for chunk in chunks.of_source(spec, words)))
    if not found:
        raise UserError("the documents have no text", documents)
    record = {"documents": documents, "content": content(documents), "words": words, "chunks": len(found)}
    record["embedder"] = embedder
    model = load_embedder(embedder) if embedder else None
    record["digest"] = digest(model) if model else ""
    record["injections"] = sum(bool(injections.found(chunk.passage)) for chunk in found)
    old = files.read_json(folder / RECORD)
    if old == record:
        return record
    vectors = _vectors(found, folder, model, old, record["digest"], progress) if model else None
    with files.folder(folder, RECORD) as work:
        rows = ({"id": c.id, "document": c.document, "title": c.title, "text": c.text} for c in found)
        files.write_lines(work / CHUNKS, rows)
        if vectors is not None:
            np.save(work / VECTORS, vectors, allow_pickle=False)
        files.write_json(work / RECORD, record)
        judge(Index(work))
        files.remove(folder)
    files.remove(_parts(folder))
    return record


def _parts(folder: Path) -> Path:
    return folder.with_name(folder.name + ".parts")


def _vectors(
    found: list[Chunk], folder: Path, model: Embedder, old: Json, made_by: str, progress: Callable[[int, int], None]
) -> np.ndarray:
    """Returns the vectors [chunks, width] in float16. Vectors in the old index or in an unfinished build are reused,
    and missing vectors are computed."""
    known: dict[str, np.ndarray] = {}
    if old.get("digest") == made_by:
        index = Index(folder)
        known = dict(zip((c.id for c in index.chunks), index.vectors, strict=True)) if index.dense else {}
    parts = _parts(folder)
    for path in sorted(parts.glob(f"{made_by}-*.npz")):
        with np.load(path, allow_pickle=False) as saved:
            known |= dict(zip(saved["ids"].tolist(), saved["vectors"], strict=True))
    missing = [chunk for chunk in found if chunk.id not in known]
    for at in range(0, len(missing), PART):
        progress(len(found) - len(missing) + at, len(found))
        block = missing[at : at + PART]
        made = _unit(model.embed([chunk.passage for chunk in block], "document")).astype(np.float16)
        ids = np.array([chunk.id for chunk in block])
        parts.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, ids=ids, vectors=made)
        files.write(parts / f"{made_by}-{ids[0]}.npz", buffer.getvalue())
        known |= dict(zip(ids.tolist(), made, strict=True))
    progress(len(found), len(found))
    return np.stack([known[chunk.id] for chunk in found])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
