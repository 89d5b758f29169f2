"""Computes each batch as a pure function of (seed, step). So the step is all that a run must save in order to resume,
and the batches do not depend on the number of hosts."""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from common import files
from common.errors import UserError
from common.types import Config
from data import dataset, sources, splits, views
from data.dataset import Dataset, has_chats, prepare, texts
from data.rows import batch as batches
from data.rows import layout, mixture
from data.rows.batch import Batch
from data.rows.layout import Part
from data.text import formats, template
from data.text.tokenizer import DEFAULT_TEMPLATE, Tokenizer
from data.views import View

TOKENIZER_END = "special_tokens_map.json"  # `Tokenizer.save` writes it last: it marks the folder as complete


class Loader:
    """Computes batches of `batch_size` rows with `seq_len` token positions each. `rows` is the slice of each batch that
    this process reads.

    A training loader repeats its rows forever. Each row of a source occurs once in each epoch of the source. A held-out
    loader reads its rows once, in order, and interleaves its sources. The last batch of a held-out loader is padded
    with empty rows.
    """

    def __init__(
        self,
        parts: list[Part],
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        packing: str = "best_fit",
        shuffle: bool = True,
        truncate: bool = True,
        max_bad: float = 0.001,
        rows: slice | None = None,
        heldout: bool = False,
        pad_id: int = 0,
        view: View = View(),  # noqa: B008
    ):
        self.raw = False  # whether prompts are used without a chat template
        self.parts, self.seq_len, self.batch_size, self.seed = parts, seq_len, batch_size, seed
        self.shuffle, self.heldout, self.pad_id = shuffle and not heldout, heldout, pad_id
        self.view = view
        self.mine = np.arange(batch_size)[rows or slice(None)]
        holds = {(d.sides, d.columns, d.stored.tags is not None) for d in (part.dataset for part in parts)}
        if len(holds) > 1:
            kinds = " and ".join(sorted({part.dataset.kind for part in parts}))
            raise UserError(f"a mixture of {kinds} records", "data.source", "train on one kind of records")
        self.sides, self.columns, self.tagged = holds.pop()
        names = dict.fromkeys((*batches.TOKENS, *self.columns))
        self.kind = batches.kind_of(batches.join(dict.fromkeys(self.sides, names)))
        how = {"seq_len": seq_len, "packing": packing, "truncate": truncate, "max_bad": max_bad, "seed": seed}
        self.packed = [layout.packed(part, **how) for part in parts]
        self.sizes = [len(packed.sides[0]) for packed in self.packed]
        self._check_sizes()
        self.shares = mixture.shares([part.weight for part in parts])
        if heldout:
            self.order = _interleave(self.sizes)
        self.settings = {**how, "batch_size": batch_size, "shuffle": self.shuffle}
        if view.apply:
            self.settings["view"] = view.settings
        self.settings |= {"weights": [part.weight for part in parts], "sources": [_part_id(part) for part in parts]}

    def _check_sizes(self) -> None:
        for part, size in zip(self.parts, self.sizes):
            name = part.dataset.stored.index["source"]
            if size == 0:
                raise UserError("no rows", name)
            if size < self.batch_size and not self.heldout:
                fix = "lower data.batch_size or data.seq_len, or add records"
                raise UserError(f"{size} rows are fewer than one batch of {self.batch_size}", name, fix)

    @property
    def num_batches(self) -> int:
        """The number of batches needed to read every row of all sources once."""
        return -(-sum(self.sizes) // self.batch_size)

    @property
    def tokens_per_batch(self) -> int:
        """The number of token positions in a batch over all hosts, including padding."""
        return self.batch_size * self.seq_len * len(self.sides)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def report(self) -> dict:
        """Statistics of the records, summed over the sources. `fill` is the fraction of token positions that are not
        padding."""
        total = {"documents": 0, "tokens": 0, "learnt": 0, "bad": 0, "truncated": 0, "split": 0, "dropped": 0}
        causes = []
        for part, packed in zip(self.parts, self.packed):
            causes += dataset.causes(part.dataset.report["causes"])
            for key in total:
                total[key] += {**part.dataset.report, **packed.report}[key]
        slots = sum(self.sizes) * self.seq_len * len(self.sides)
        used = sum(int(side.lengths.sum()) for packed in self.packed for side in packed.sides)
        return {**total, "rows": sum(self.sizes), "fill": used / slots, "causes": causes}

    @property
    def system(self) -> str:
        """The system prompt with which every chat of every source begins, or "" if the chats have none or their system
        prompts differ."""
        texts = {text for part in self.parts for text in part.dataset.report["system"]}
        return texts.pop() if len(texts) == 1 else ""

    def notes(self, tokenizer: Tokenizer) -> list[str]:
        """Remarks about the records of each source: how the records were processed, and which columns were not used."""
        lines = ["data.chat_template=none: prompts and completions are joined as they are"] if self.raw else []
        for part in self.parts:
            report, source = part.dataset.report, part.dataset.stored.index["source"]
            found = dataset.notes(report, tokenizer)
            found += [f"unused: {left}"] if (left := dataset.unused(report)) else []
            lines += [f"{source}: {line}" for line in found]
        return lines

    def values(self) -> dict[str, np.ndarray]:
        """Maps each column to its values for the documents of all sources."""
        tables = [part.dataset.stored.columns for part in self.parts]
        return {name: np.concatenate([table[:, i] for table in tables]) for i, name in enumerate(self.columns)}

    def batch(self, step: int) -> Batch:
        """The rows that this process reads from the global batch of a step."""
        index = step * self.batch_size + self.mine
        source, nth = self._place(index)
        parts = {side: self._fill(source, nth, i) for i, side in enumerate(self.sides)}
        return batches.join(self._viewed(parts, step) if self.view.apply else parts)

    def _viewed(self, parts: dict[str, Batch], step: int) -> dict[str, Batch]:
        rows = {side: [] for side in parts}
        for i, place in enumerate(self.mine.tolist()):
            rng = np.random.default_rng((self.seed, step, place))
            for side, part in parts.items():
                rows[side].append(self.view.apply({name: x[i] for name, x in part.items()}, rng))
        return {side: {name: np.stack([row[name] for row in each]) for name in each[0]} for side, each in rows.items()}

    def _place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps each position in the stream of rows to (index of the source, row within the source). A source index of
        -1 means an empty row."""
        if self.heldout:
            index = index % (self.num_batches * self.batch_size)
            inside = index < len(self.order)
            source, row = self.order[np.where(inside, index, 0)].T
            return np.where(inside, source, -1), row
        source, nth = mixture.assign(index, self.shares, self.seed)
        row = np.empty_like(nth)
        for s in np.unique(source):
            here = source == s
            row[here] = mixture.row(nth[here], self.sizes[s], self.seed + s, self.shuffle)
        return source, row

    def _fill(self, source: np.ndarray, row: np.ndarray, side: int) -> Batch:
        batch = {name: np.zeros((len(source), self.seq_len), dtype) for name, dtype in batches.TOKENS.items()}
        batch["tokens"][:] = batch["targets"][:] = self.pad_id
        batch |= {name: np.zeros(len(source), batches.COLUMNS[name]) for name in self.columns}
        if self.tagged:
            batch["tags"] = np.full_like(batch["tokens"], -1)
        for s in np.unique(source[source >= 0]):
            here = np.flatnonzero(source == s)
            data, packed = self.parts[s].dataset, self.packed[s]
            layout.write(batch, here, data, packed.sides[side], row[here], self.pad_id)
            for i, name in enumerate(self.columns):
                batch[name][here] = data.stored.columns[len(self.sides) * packed.items[row[here]] + side, i]
        return batch

    def state_dict(self) -> dict:
        return {"fingerprint": self.fingerprint, "settings": self.settings}

    def load_state_dict(self, saved: dict) -> None:
        """Checks that this loader yields the same batches as the loader that was saved. If not, raises a UserError that
        lists the changed settings."""
        if saved.get("fingerprint") == self.fingerprint:
            return
        old = saved.get("settings", {})
        changed = [f"{k} {old.get(k)!r} -> {v!r}" for k, v in self.settings.items() if old.get(k) != v]
        fix = 'set allow=("data",) to continue with the new data'
        raise UserError(f"the data changed: {'; '.join(changed)}", "resume", fix)


def make_loaders(
    data: Config, tok: Tokenizer, seed: int = 0, rows: slice | None = None
) -> tuple[Loader, Loader | None]:
    """Makes the training loader and the held-out loader for the `data` section of a config. The held-out loader is None
    if nothing is held out.

    If `eval_source` is not set, each source's own validation split is held out. If a source has no validation split, a
    fraction of its documents is held out.
    """
    weights = sources.mixture(data.source)
    datasets = {name: _prepare(data, name, tok) for name in weights}
    options = dict(seq_len=data.seq_len, batch_size=data.batch_size, seed=seed, packing=data.packing)
    options |= dict(truncate=data.truncate, max_bad=data.max_bad, rows=rows, pad_id=_pad_id(tok))
    options["view"] = views.view(data.view, tok, data.seq_len)
    own = {name: _own_split(name, data.eval_source) for name in weights}
    apart = sources.mixture(data.eval_source) if data.eval_source else [held for held in own.values() if held]
    sides = {n: d.split(0.0 if data.eval_source or own[n] else data.holdout) for n, d in datasets.items()}
    train = [Part(d, sides[name][0], weights[name]) for name, d in datasets.items()]
    out = [Part(d, np.arange(len(d))) for d in (_prepare(data, name, tok) for name in apart)]
    out += [Part(d, sides[name][1]) for name, d in datasets.items() if len(sides[name][1])]
    loader = Loader(train, shuffle=data.shuffle, **options)
    loader.raw = data.chat_template == "none"
    return loader, Loader(out, heldout=True, **options) if out else None


def _own_split(name: str, eval_source: str) -> str:
    """The name of the validation split that a source contains, or "" if the source has none. Prints how each split is
    used."""
    names = sources.split_names(name)
    held = next((f"{name}@{split}" for split in names if splits.NAMES.get(split) == "validation"), "")
    if names:
        out = eval_source or held or "a fraction of train"
        print(f"{name} has the splits {', '.join(names)}; train is used for training; held out: {out}", file=sys.stderr)
    return held


def load_tokenizer(data: Config, default: str = "bytes") -> Tokenizer:
    """Loads the tokenizer that a config names, or else `default`, the model's own tokenizer. The tokenizers "bpe:N" and
    "spm:N" are trained once and cached.

    `data.chat_template` replaces the tokenizer's own chat template. If the data are chats and the tokenizer has no chat
    template, the tokenizer gets the default template, so that training matches serving.
    """
    spec = data.tokenizer or default
    trained = spec.startswith(("bpe:", "spm:"))
    found = _trained_tokenizer(data, spec) if trained else formats.load(spec)
    found.reads_control = data.read_control
    if data.chat_template:
        found.chat_template, found.tool_template = template.named(data.chat_template), None
    if found.chat_template is None:
        first = next(iter(sources.mixture(data.source)))
        found.chat_template = DEFAULT_TEMPLATE if has_chats(first, data.format, data.fields) else None
    return found


def _trained_tokenizer(data: Config, spec: str) -> Tokenizer:
    names = list(sources.mixture(data.source))
    key = [spec, data.format, data.fields, [sources.content_id(name) for name in names]]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = Path(data.cache).expanduser() / "tokenizers" / digest[:24]
    files.clean(folder.parent)  # deletes unfinished tokenizers that killed processes left behind
    if folder.is_dir() and not (folder / TOKENIZER_END).is_file():  # the folder is damaged, so write it again
        files.remove(folder)
    if not (folder / TOKENIZER_END).is_file():
        corpus = (text for name in names for text in texts(name, data.format, data.fields))
        save_tokenizer(formats.load(spec, lambda: corpus), folder)
    return formats.load(folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer to a folder, completely or not at all. Files already in the folder are left unchanged."""
    with contextlib.suppress(FileExistsError), files.folder(folder, TOKENIZER_END) as work:  # already written
        tokenizer.save(work)


def _prepare(data: Config, name: str, tok: Tokenizer) -> Dataset:
    options = dict(form=data.format, fields=data.fields, max_bad=data.max_bad, learn=data.learn)
    return prepare(name, tok, folder=data.cache, **options)


def _pad_id(tok: Tokenizer) -> int:
    return next((i for i in (tok.pad_id, tok.eos_id) if i is not None), 0)


def _part_id(part: Part) -> str:
    digest = hashlib.sha256(np.asarray(part.documents, np.int64).tobytes()).hexdigest()
    return f"{part.dataset.stored.index['source']}:{part.dataset.fingerprint[:16]}:{digest[:16]}"


def _interleave(sizes: list[int]) -> np.ndarray:
    """Lists (source, row) for all rows. The rows of each source keep their order, and are spread evenly over the list.
    Returns int64 [sum(sizes), 2]."""
    pairs = np.array([(s, r) for s, size in enumerate(sizes) for r in range(size)], np.int64).reshape(-1, 2)
    place = (pairs[:, 1] + 0.5) / np.maximum(np.asarray(sizes), 1)[pairs[:, 0]]
    return pairs[np.argsort(place, kind="stable")]
