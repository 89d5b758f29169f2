"""Finds contamination: rows of a task that occur in training data, and near-duplicates across splits."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from common import files
from common.errors import UserError
from data import cache, formats, sources
from data.text.tokenizer import Tokenizer
from evals.scorers import WORD

NGRAM = 13  # number of consecutive words that must match, as in Brown et al. 2020, appendix C
LEAST = 8  # a question with fewer words must match together with its answer
# A sequence of FORM words is boilerplate if it occurs in more than FEW rows and in more than a fraction SHARE of all
# rows.
FORM, FEW, SHARE = 5, 3, 0.05
SHINGLE, JACCARD = 3, 0.8  # words per shingle, and the minimum Jaccard similarity of near-duplicates
# MinHash with 96 hashes in bands of 4: two rows of similarity 0.8 agree on at least one band with probability 1 - 3e-6.
HASHES, BAND = 96, 4
MOST = 20_000  # at most this many rows, spread evenly over all rows, are compared
SHOWN = 3  # maximum number of pairs or rows that a message names
BLOCK = 1 << 18  # number of words that are searched at a time
MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd number, so that multiplication by it modulo 2^64 is invertible

Rows = Sequence[dict]
Prompt = str | list[dict]


def words(text: str) -> list[str]:
    """The words of a text, in lower case. A word is a run of letters and digits."""
    return WORD.findall(text.lower())


def asked(prompt: Prompt) -> str:
    """A prompt as plain text, without its system message."""
    return prompt if isinstance(prompt, str) else "\n".join(t["content"] for t in prompt if t["role"] != "system")


# --- near-duplicates ---


def across(parts: Mapping[str, Rows]) -> list[str]:
    """Returns messages about rows of one split that are near-duplicates of rows in another split."""
    lines, total = [], sum(map(len, parts.values()))
    stride = max(1, -(-total // MOST))
    rows = [(name, row) for name, part in parts.items() for row in part[::stride]]
    pairs = near([asked(row["prompt"]) for _, row in rows]) if len(parts) > 1 else []
    for a, b in combinations(parts, 2):
        found = [(rows[i][1], rows[j][1]) for i, j in pairs if {rows[i][0], rows[j][0]} == {a, b}]
        if found:
            named = ", ".join(f"{x['where']} and {y['where']}" for x, y in found[:SHOWN])
            some = f" (every {stride}th row was compared)" if stride > 1 else ""
            lines.append(f"{len(found):,} questions of {a} and {b} are nearly the same{some}: {named}")
    return lines


def near(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the indices (i, j), with i < j, of pairs of texts whose sets of word shingles have a Jaccard similarity
    of JACCARD or more.

    Candidate pairs are found by banded MinHash (Broder 1997), and then their exact similarity is computed. If more than
    two texts are identical, each is paired only with the next of them, not with all others.
    """
    sets = [shingles(text) for text in texts]
    counts = Counter(gram for found in sets for gram in found)
    many = max(FEW, SHARE * len(texts))
    sets = [{gram for gram in found if counts[gram] <= many} or found for found in sets]  # without common boilerplate
    factors = np.random.default_rng(0).integers(1, 1 << 62, HASHES, np.uint64) * 2 + 1
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for i, found in enumerate(sets):
        hashes = np.fromiter(found, np.uint64, len(found))[:, None] * MIX * factors >> np.uint64(32)
        for at, band in enumerate(hashes.min(0).reshape(-1, BAND) if len(found) else ()):
            buckets[at, band.tobytes()].append(i)
    candidates = {pair for same in buckets.values() for pair in pairwise(same)}
    similar = lambda a, b: len(a & b) >= JACCARD * len(a | b)
    return sorted((i, j) for i, j in candidates if similar(sets[i], sets[j]))


def shingles(text: str) -> set[int]:
    found = words(text)
    grams = (" ".join(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1)))
    return {zlib.crc32(gram.encode()) + 1 for gram in grams if gram}


# --- contamination ---


def seen(rows: Sequence[tuple[str, str]], source: str, tokenizer: Tokenizer) -> dict[int, str]:
    """Finds rows (question, answer) that occur in the texts of a source. Returns {index of a row: location of the first
    text that contains the row}.

    A text contains a row if it contains NGRAM consecutive words of the row's question, or all words of a shorter
    question. Phrases that many rows share, such as an instruction, are first removed from the questions. If fewer than
    LEAST consecutive words remain, the text must contain the whole question followed by its answer. `source` is a data
    source, a run folder or a token cache.
    """
    wanted: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # length: {hash: rows}
    for i, own in enumerate(_own([_ids(words(question)) for question, _ in rows])):
        size = min(NGRAM, max(map(len, own), default=0))
        if size < LEAST:
            own = [_ids(words(" ".join(rows[i])))]
            size = len(own[0])
        for h in {h for part in own for h in _rolling(part, size).tolist()} if size else ():
            wanted[size][h].append(i)
    known = {size: np.sort(np.fromiter(hashes, np.uint64, len(hashes))) for size, hashes in wanted.items()}
    found: dict[int, str] = {}
    for ids, starts, places in _blocks(_texts(source, tokenizer)):
        for size, hashes in known.items():
            here = _rolling(ids, size)
            for at in np.flatnonzero(np.isin(here, hashes)):
                for i in wanted[size][int(here[at])]:
                    found.setdefault(i, places[int(np.searchsorted(starts, at, "right")) - 1])
    return dict(sorted(found.items()))


def _own(rows: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yields, for each row, the word sequences that remain after removing boilerplate. Boilerplate is any sequence of
    FORM words that occurs in many rows."""
    grams = [_rolling(ids, FORM) for ids in rows]
    found, counts = np.unique(np.concatenate([np.unique(g) for g in grams]), return_counts=True)
    form = found[counts > max(FEW, SHARE * len(rows))]
    for ids, own in zip(rows, grams, strict=True):
        cut = np.zeros(len(ids), bool)
        for at in np.flatnonzero(np.isin(own, form)):
            cut[at : at + FORM] = True
        edges = np.flatnonzero(np.diff(cut, prepend=True, append=True))
        yield [ids[a:b] for a, b in edges.reshape(-1, 2)]


def _blocks(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Groups the texts into blocks, and yields (word hashes, index of each text's first word, location of each text)
    per block. A hash of 0 separates two texts."""
    parts, places, size = [], [], 0
    starts = lambda: np.cumsum([0, *(len(ids) + 1 for ids in parts[::2])])[:-1]
    for where, text in texts:
        parts += [_ids(words(text)), np.zeros(1, np.uint64)]
        places.append(where)
        size += len(parts[-2])
        if size > BLOCK:
            yield np.concatenate(parts), starts(), places
            parts, places, size = [], [], 0
    if parts:
        yield np.concatenate(parts), starts(), places


def _ids(found: list[str]) -> np.ndarray:
    """A 64-bit hash of each word."""
    data = [(zlib.crc32(w.encode()) << 32) | zlib.adler32(w.encode()) for w in found]
    return np.array(data, np.uint64) * MIX


def _rolling(ids: np.ndarray, size: int) -> np.ndarray:
    """Hashes every window of `size` consecutive words, modulo 2^64. Returns an array [max(0, N - size + 1)]."""
    total = np.zeros(max(0, len(ids) - size + 1), np.uint64)
    for i in range(size):
        total = (total ^ (total >> np.uint64(29))) * MIX + ids[i : i + len(total)]
    return total


def _texts(source: str, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    folder = Path(source).expanduser()
    if (folder / cache.INDEX).is_file():
        yield from _cached(folder, tokenizer)
    elif data := files.read_json(folder / "config.json").get("data"):
        for name in sources.mixture(data["source"]):
            yield from _records(name, data["format"], data["fields"])
    else:
        yield from _records(source, "auto", "")


def _records(source: str, form: str, fields: str) -> Iterator[tuple[str, str]]:
    """Yields the location and the text of each record. For a record that training cannot read, the text consists of all
    strings in the record."""
    for row in sources.rows(source):
        try:
            parts = formats.example(row.record or {}, form, formats.parse_fields(fields)).parts()
            yield row.where, "\n".join(text for part in parts for text in part.texts() or [part.plain()])
        except UserError:
            yield row.where, "\n".join(v for v in (row.record or {}).values() if isinstance(v, str))


def _cached(folder: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    stored = cache.read(folder)
    if stored.index.get("tokenizer") != tokenizer.fingerprint:
        fix = "name the data from which the cache was made, or the run folder"
        raise UserError("the token cache was made with another tokenizer", str(folder), fix)
    for i, (start, end) in enumerate(zip(stored.offsets, stored.offsets[1:])):
        yield f"{folder}, document {i}", tokenizer.decode(stored.tokens[start:end].tolist())
