"""Packing, permutations, mixtures, the cache and the loader: every token once, the same on any number of hosts."""

import json
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from configs import base
from data import cache, dataset
from data.rows import batch as batches
from data.rows import mixture, pack
from data.rows.layout import Part
from data.rows.loader import Loader, load_tokenizer, make_loaders
from data.rows.pack import Pieces
from data.text import formats
from data.text.tokenizer import DEFAULT_TEMPLATE
from data.views import View

PAD, EOS = 258, 257


@pytest.fixture(scope="module")
def tok():
    return formats.load("bytes")


@pytest.fixture
def config(tmp_path):
    data = base.get_config().data
    data.cache = str(tmp_path / "cache")
    return data


def made(tmp_path, tok, rows, **options):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataset.prepare(str(path), tok, folder=tmp_path / "cache", **options)


def loader(data, **options):
    return Loader([Part(data, np.arange(len(data)))], **{"pad_id": PAD, "shuffle": False, **options})


# ---- one row by hand ----


def test_two_packed_documents_by_hand(tmp_path, tok):
    data = made(tmp_path, tok, [{"text": "abc"}, {"text": "de"}])
    batch = loader(data, seq_len=8, batch_size=1, packing="concat").batch(0)
    a, b, c, d, e = b"abcde"
    assert batch["tokens"].tolist() == [[a, b, c, EOS, d, e, EOS, PAD]]
    assert batch["targets"].tolist() == [[b, c, EOS, PAD, e, EOS, PAD, PAD]]
    assert batch["mask"].tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert {k: v.dtype for k, v in batch.items() if k != "mask"} == dict.fromkeys(set(batch) - {"mask"}, np.int32)
    assert batch["mask"].dtype == np.float32


def test_a_cut_document_keeps_every_target(tmp_path, tok):
    data = made(tmp_path, tok, [{"text": "abcdefg"}])
    for packing in ("concat", "best_fit", "none"):
        batch = loader(data, seq_len=4, batch_size=2, packing=packing).batch(0)
        rows = sorted(zip(batch["tokens"].tolist(), batch["targets"].tolist(), batch["mask"].tolist()))
        assert rows == [
            ([*b"abcd"], [*b"bcde"], [1, 1, 1, 1]),
            ([*b"efg", EOS], [*b"fg", EOS, PAD], [1, 1, 1, 0]),
        ]
        assert batch["positions"].tolist() == [[0, 1, 2, 3]] * 2


def test_completion_and_its_end_are_learnt_even_where_padding_is_eos(tmp_path):
    tok = formats.load("bytes")
    tok.pad_id = tok.eos_id
    data = made(tmp_path, tok, [{"prompt": "1+1=", "completion": "2"}])
    batch = loader(data, seq_len=8, batch_size=1, packing="none", pad_id=EOS).batch(0)
    assert batch["mask"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["targets"][0, 3:5].tolist() == [ord("2"), EOS]


def test_pairs_are_two_batches(tmp_path, tok):
    data = made(tmp_path, tok, [{"prompt": "ab", "chosen": "c", "rejected": "de"}])
    batch = loader(data, seq_len=6, batch_size=1, packing="none").batch(0)
    assert batch["chosen"]["tokens"].tolist() == [[*b"abc", EOS, PAD, PAD]]
    assert batch["rejected"]["tokens"].tolist() == [[*b"abde", EOS, PAD]]
    assert batch["chosen"]["mask"].tolist() == [[0, 1, 1, 0, 0, 0]]
    assert batch["rejected"]["mask"].tolist() == [[0, 1, 1, 1, 0, 0]]
    assert batch["rejected"]["segments"].tolist() == [[1, 1, 1, 1, 1, 0]]


def test_a_group_is_a_batch_of_each_answer_with_its_number(tmp_path, tok):
    """The answers of a row belong to one prompt, in their order, and the ratings come along as [B]."""
    rows = [{"prompt": f"{i}:", "answers": ["x", "yy", "z"], "ratings": [i, 0.5, -1]} for i in range(6)]
    data = made(tmp_path, tok, rows)
    assert len(data) == 6 and data.sides == batches.answers(3)
    found = loader(data, seq_len=6, batch_size=4, packing="best_fit", shuffle=True)
    batch = found.batch(0)
    assert found.kind == batches.kind_of(batch) == "group" and found.tokens_per_batch == 3 * 4 * 6
    parts = list(batches.parts(batch).values())
    prompts = parts[0]["tokens"][:, 0] - ord("0")
    assert len(set(prompts)) == 4 and all((p["tokens"][:, 0] - ord("0") == prompts).all() for p in parts)
    assert [bytes(p["tokens"][0, 2:4].astype(np.uint8)) for p in parts] == [b"x\1", b"yy", b"z\1"]
    assert parts[0]["rating"].dtype == np.float32 and (parts[0]["rating"] == prompts).all()
    assert parts[1]["rating"].tolist() == [0.5] * 4 and parts[2]["rating"].tolist() == [-1.0] * 4
    held = data.split(0.4)[1]
    assert 0 < len(held) < 6
    parts = batches.parts(Loader([Part(data, held)], seq_len=6, batch_size=9, heldout=True).batch(0))
    wanted = [*held, *[0] * (9 - len(held))]  # the last batch is filled up with empty rows
    assert parts["answer000"]["rating"].tolist() == wanted and parts["answer000"]["segments"][len(held) :].sum() == 0


def test_labels_are_a_column_of_the_batch(tmp_path, tok):
    """One record a row, whatever the packing; a text that is too long is cut off, not continued in another row."""
    rows = [{"text": "ab" * (1 + 8 * (i == 2)), "label": i % 2 == 0} for i in range(4)]
    data = made(tmp_path, tok, rows, form="labelled")
    batch = loader(data, seq_len=8, batch_size=4, packing="best_fit").batch(0)
    assert batch["label"].tolist() == [1, 0, 1, 0] and batch["label"].dtype == np.int32
    assert batch["segments"].max() == 1 and (batch["segments"] > 0).sum(1).tolist() == [3, 3, 8, 3]
    with pytest.raises(UserError, match="a mixture of labelled text and text records"):
        plain = made(tmp_path, tok, rows, form="text")
        Loader([Part(d, np.arange(4)) for d in (data, plain)], seq_len=8, batch_size=2)


def test_tags_stand_at_the_first_token_of_their_word(tmp_path, tok):
    data = made(tmp_path, tok, [{"tokens": ["Ann", "is", "ü"], "tags": [3, 0, 2]}, {"tokens": ["a"], "tags": [7]}])
    batch = loader(data, seq_len=16, batch_size=1, packing="concat").batch(0)
    assert batch["tokens"][0, :10].tolist() == [*"Ann is ü".encode(), EOS]
    assert batch["tags"].tolist() == [[3, -1, -1, -1, 0, -1, -1, 2, -1, -1, 7, -1, -1, -1, -1, -1]]


# ---- packing ----


def test_best_fit_decreasing_by_hand():
    """7 and 3 fill a row, 6 and 4 another; first-fit in order would need a third."""
    rows = pack._best_fit(np.array([3, 4, 6, 7]), 10)
    assert [sorted(row) for row in rows] == [[0, 3], [1, 2]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", ["best_fit", "concat", "none"])
def test_every_slot_is_in_one_row(how, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 120, 300)
    pieces = Pieces(np.cumsum(lengths) - lengths, lengths)
    if how == "concat":
        rows = pack.concat(pieces, 64)
    else:
        short = pack.cut(pieces, 64)
        rows = pack.best_fit(short, 64, seed) if how == "best_fit" else pack.none(short)
    slots = pack.ranges(rows.starts, rows.lengths)
    assert sorted(slots.tolist()) == list(range(lengths.sum()))
    used = np.add.reduceat(rows.lengths, rows.bounds[:-1])
    assert used.max() <= 64 and (how != "concat" or (used[:-1] == 64).all())


def test_best_fit_is_fast_and_full():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.5, 1, 10_000).astype(int) + 2, 1024)
    start = time.perf_counter()
    rows = pack.best_fit(Pieces(np.cumsum(lengths) - lengths, lengths), 1024, 0)
    assert time.perf_counter() - start < 2 and rows.fill(1024) > 0.98


def test_real_text_fills_98_percent(config, tok):
    config.tokenizer, config.seq_len, config.source = "bytes", 1024, "pydocs"
    report = make_loaders(config, tok)[0].report
    assert report["fill"] > 0.98 and report["truncated"] == 0 and report["bad"] == 0


# ---- truncation ----


def test_truncated_completions_are_counted_and_hopeless_ones_dropped(tmp_path, tok):
    rows = [{"prompt": "p", "completion": "c" * n} for n in (2, 20)] + [{"prompt": "p" * 20, "completion": "c"}]
    data = made(tmp_path, tok, rows)
    found = loader(data, seq_len=8, batch_size=2, packing="none")
    assert (found.report["truncated"], found.report["dropped"], found.report["rows"]) == (1, 1, 2)
    assert found.batch(0)["mask"].sum(1).tolist() == [3, 8]
    with pytest.raises(UserError, match="2 of 3 documents are longer than seq_len=8"):
        loader(data, seq_len=8, batch_size=1, packing="none", truncate=False)
    assert loader(data, seq_len=8, batch_size=1, packing="none", truncate=False, max_bad=0.7).report["dropped"] == 2


def test_nothing_to_learn_is_an_error(tmp_path, tok):
    with pytest.raises(UserError, match="no assistant turn"):
        made(tmp_path, tok, [{"messages": [{"role": "user", "content": "hi"}]}])


def test_less_than_a_batch_is_an_error(tmp_path, tok):
    data = made(tmp_path, tok, [{"text": "abc"}])
    with pytest.raises(UserError, match="1 rows are fewer than one batch of 2"):
        loader(data, seq_len=8, batch_size=2)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no records"):
        dataset.prepare(str(tmp_path / "empty.jsonl"), tok, folder=tmp_path)


# ---- order ----


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_permutation_is_a_bijection(n):
    order = mixture.permute(np.arange(n), n, 5, 0)
    assert sorted(order.tolist()) == list(range(n))
    if n > 50:
        assert (order == mixture.permute(np.arange(n), n, 5, 0)).all()
        assert (order != mixture.permute(np.arange(n), n, 5, 1)).mean() > 0.9


def test_permutations_are_even():
    """Over many keys the image of one index is uniform, and order does not correlate with order (sd 1/sqrt(n - 1))."""
    n, keys = 64, 400
    orders = np.array([mixture.permute(np.arange(n), n, key) for key in range(keys)])
    counts = np.bincount(orders[:, 3], minlength=n)
    assert ((counts - keys / n) ** 2 / (keys / n)).sum() / (n - 1) < 1.6  # chi-square over its degrees of freedom
    slopes = [np.corrcoef(order, np.arange(n))[0, 1] for order in orders]
    assert abs(np.mean(slopes)) < 0.03 and 0.1 < np.std(slopes) < 0.15


def texts(n):
    return [{"text": f"{i:04d}"} for i in range(n)]


def names(batch) -> list[str]:
    return [bytes(row[:4].astype(np.uint8)).decode() for row in batch["tokens"]]


def test_every_row_once_an_epoch_across_uneven_batches(tmp_path, tok):
    data = made(tmp_path, tok, texts(10))
    found = loader(data, seq_len=5, batch_size=4, packing="none", shuffle=True)
    seen = [name for step in range(5) for name in names(found.batch(step))]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [f"{i:04d}" for i in range(10)]
    assert seen[:10] != seen[10:]


def test_same_batches_on_any_number_of_hosts(tmp_path, tok):
    data = made(tmp_path, tok, texts(20))
    options = dict(seq_len=5, batch_size=8, packing="none", shuffle=True, seed=3)
    one = loader(data, **options)
    for hosts in (2, 4):
        each = 8 // hosts
        parts = [loader(data, rows=slice(h * each, (h + 1) * each), **options) for h in range(hosts)]
        for step in (0, 1, 17):
            for key, value in one.batch(step).items():
                assert (np.concatenate([part.batch(step)[key] for part in parts]) == value).all()
        assert {part.fingerprint for part in parts} == {one.fingerprint}


def test_mixture_keeps_its_shares_in_every_block():
    counts = mixture.shares([0.7, 0.299, 0.001])
    assert counts.tolist() == [700, 299, 1]
    source, nth = mixture.assign(np.arange(3000), counts, 0)
    for block in range(3):
        assert Counter(source[block * 1000 : (block + 1) * 1000].tolist()) == {0: 700, 1: 299, 2: 1}
    for s in range(3):  # each source is read from its start, without gaps
        assert sorted(nth[source == s].tolist()) == list(range(3 * counts[s]))
    near = source[:100].mean()
    assert 0.1 < near < 0.5, "sources are mixed, not one after the other"


def test_mixture_of_sources_end_to_end(config, tok):
    config.source, config.seq_len, config.packing = "synthetic:add?n=40:0.8,synthetic:copy?n=40:0.2", 32, "none"
    train, heldout = make_loaders(config, tok, 0)
    batches = [train.batch(step)["tokens"][:, 0] for step in range(125)]
    assert (np.concatenate(batches) == ord("c")).mean() == 0.2
    assert {source for source, _ in heldout.order} == {0, 1}


def test_held_out_rows_come_once_in_order_and_never_in_training(config, tok):
    config.source, config.seq_len, config.packing, config.holdout = "synthetic:copy?n=300", 32, "none", 0.2
    train, heldout = make_loaders(config, tok, 0)
    out = [
        bytes(t.astype(np.uint8)) for b in range(heldout.num_batches) for t in heldout.batch(b)["tokens"] if t[0] < 256
    ]
    kept = {bytes(t.astype(np.uint8)) for s in range(train.num_batches) for t in train.batch(s)["tokens"]}
    assert 30 < len(out) < 90 and len(set(out)) == len(out) == sum(heldout.sizes) and not kept & set(out)
    last = heldout.batch(heldout.num_batches - 1)
    assert last["mask"][len(out) % config.batch_size :].sum() == 0 or len(out) % config.batch_size == 0


def test_the_validation_files_of_a_folder_are_held_out(config, tok, tmp_path, capsys):
    """Without a share of the training files; an eval_source of one's own wins, and they are not trained on even so."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", texts(40)), ("validation", [{"text": f"v{i:03d}"} for i in range(5)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.source, config.seq_len, config.packing = str(folder), 5, "none"
    train, heldout = make_loaders(config, tok, 0)
    assert (train.report["rows"], heldout.report["rows"]) == (40, 5)
    assert names(heldout.batch(0))[:5] == ["v000", "v001", "v002", "v003", "v004"]
    said = f"{folder} has the splits train, validation; train is used for training; held out: {folder}@validation\n"
    assert said in capsys.readouterr().err
    config.eval_source = str(folder / "train.jsonl")
    train, heldout = make_loaders(config, tok, 0)
    assert (train.report["rows"], heldout.report["rows"]) == (40, 40) and "train.jsonl" in capsys.readouterr().err
    config.source, config.eval_source, config.holdout = f"{folder}@train", "", 0.2
    train, heldout = make_loaders(config, tok, 0)
    assert train.report["rows"] + heldout.report["rows"] == 40 and capsys.readouterr().err == ""


def test_the_split_depends_on_the_document_alone(tmp_path, tok):
    few, more = made(tmp_path, tok, texts(50)), made(tmp_path, tok, texts(100))
    held = few.split(0.2)[1].tolist()
    assert held and held == [i for i in more.split(0.2)[1].tolist() if i < 50]
    assert len(made(tmp_path, tok, texts(2)).split(1e-9)[1]) == 1


@pytest.mark.parametrize(
    "source, packing, fingerprint, batch",
    [
        ("synthetic:add?n=300:0.7,synthetic:copy?n=300:0.3", "concat", "b70d2b3bac08", "d0b06de66c4e"),
        ("synthetic:add_pairs?n=300", "none", "805b24f4de72", "9fd16fa0cc4c"),
    ],
)
def test_batches_are_those_of_earlier_versions(config, tok, source, packing, fingerprint, batch):
    """Bit for bit, and a saved run of then goes on with them: both were written at commit 27232ea."""
    config.source, config.packing = source, packing
    train, _ = make_loaders(config, tok, 3)
    assert train.fingerprint.startswith(fingerprint) and digest(train.batch(5)) == batch


def digest(batch) -> str:
    """Of the keys in alphabetical order: of each array its bytes, of each side its digest."""
    parts = (digest(x) if isinstance(x, dict) else sha256(x.tobytes()).hexdigest() for _, x in sorted(batch.items()))
    return sha256("".join(parts).encode()).hexdigest()[:12]


def test_a_view_changes_rows_by_seed_step_and_place(tmp_path, tok):
    """The same on any number of hosts, other numbers at every step, and part of what a resume compares."""

    def cover(row, rng):
        return row | {"tokens": np.where(rng.random(5) < 0.5, row["tokens"], 0), "covered": rng.random(2)}

    data = made(tmp_path, tok, texts(8))
    options = dict(seq_len=5, batch_size=8, packing="none", view=View(cover, {"name": "cover"}))
    plain, one = loader(data, **options | {"view": View()}), loader(data, **options)
    halves = [loader(data, rows=rows, **options) for rows in (slice(0, 4), slice(4, 8))]
    batch = one.batch(0)
    assert batch["covered"].shape == (8, 2) and (batch["targets"] == plain.batch(0)["targets"]).all()
    kept = batch["tokens"] == plain.batch(0)["tokens"]
    assert 0.2 < kept.mean() < 0.8 and len({tuple(row) for row in kept.tolist()}) > 4
    for name, x in batch.items():
        assert (np.concatenate([half.batch(0)[name] for half in halves]) == x).all()
    assert (one.batch(1)["covered"] != batch["covered"]).all()
    with pytest.raises(UserError, match=r"view None -> \{'name': 'cover'\}"):
        one.load_state_dict(plain.state_dict())


def test_resume_refuses_other_data_and_says_what_changed(tmp_path, tok):
    data = made(tmp_path, tok, texts(20))
    one = loader(data, seq_len=5, batch_size=4, packing="none")
    one.load_state_dict(json.loads(json.dumps(one.state_dict())))
    with pytest.raises(UserError, match="batch_size 4 -> 5"):
        loader(data, seq_len=5, batch_size=5, packing="none").load_state_dict(one.state_dict())


# ---- cache ----


def test_cache_is_found_again_and_a_changed_source_makes_another(tmp_path, tok):
    first = made(tmp_path, tok, texts(3))
    stamp = (first.folder / "tokens.bin").stat().st_mtime_ns
    assert made(tmp_path, tok, texts(3)).folder.joinpath("tokens.bin").stat().st_mtime_ns == stamp
    assert made(tmp_path, tok, texts(4)).fingerprint != first.fingerprint
    assert made(tmp_path, tok, texts(3), form="text").fingerprint != first.fingerprint
    other = formats.load("bpe:300", lambda: ["text"])
    assert made(tmp_path, other, texts(3)).fingerprint != first.fingerprint


def test_cache_is_whole_or_not_there(tmp_path, tok, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.files, "sync", stop)  # before the rename
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, tok, texts(3))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_another_writer_of_the_same_cache_left_is_deleted(tmp_path, tok):
    """Two processes write it, one is killed, the other one's is whole."""
    first = made(tmp_path, tok, texts(3)).folder
    left = first.with_name(f"{cache.files.WRITING}0-{first.name}")
    left.mkdir()
    assert made(tmp_path, tok, texts(3)).folder == first and not left.exists()


def test_a_cache_of_an_older_layout_is_made_again(tmp_path, tok, caplog):
    data = made(tmp_path, tok, texts(3))
    index = json.loads((data.folder / "index.json").read_text())
    for key in ("layout", "sides", "columns"):
        del index[key]
    (data.folder / "index.json").write_text(json.dumps(index))
    again = made(tmp_path, tok, texts(3))
    assert again.fingerprint == data.fingerprint and again.sides == ("row",)
    assert "rebuilding the token cache" in caplog.text and "layout 1" in caplog.text


def test_a_damaged_cache_is_noticed_and_made_again(tmp_path, tok):
    data = made(tmp_path, tok, texts(30))
    tokens = data.folder / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1])
    with pytest.raises(cache.Broken, match=r"tokens.bin has \d+ bytes"):
        cache.read(data.folder)
    assert made(tmp_path, tok, texts(30)) and tokens.read_bytes() == whole
    tokens.write_bytes(b"\0" + whole[1:])
    with pytest.raises(cache.Broken, match="sha256"):
        cache.read(data.folder, check_hashes=True)


def test_cache_gives_back_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    documents = [
        cache.Document(
            rng.integers(0, 70_000, n).tolist(),
            rng.integers(0, 2, n).tolist(),
            int(n),
            {"rank": int(n), "rating": n / 7},
            rng.integers(-1, 9, n).tolist(),
        )
        for n in rng.integers(1, 40, 50)
    ]
    cache.write(tmp_path / "c", documents, {}, 70_000, lambda: None)
    stored = cache.read(tmp_path / "c")
    assert stored.tokens.dtype == np.uint32
    for i, (ids, learnt, digest, columns, tags) in enumerate(documents):
        slots = np.arange(stored.offsets[i], stored.offsets[i + 1])
        assert stored.tokens[slots].tolist() == ids and stored.hashes[i] == digest
        assert stored.mask(slots).tolist() == [*learnt[1:], 0] and stored.tags[slots].tolist() == tags
        assert dict(zip(stored.index["columns"], stored.columns[i])) == columns


# ---- tokenizers of a config ----


def test_trained_tokenizer_is_cached(config):
    config.source, config.tokenizer = "synthetic:copy?n=100", "bpe:300"
    one, two = load_tokenizer(config), load_tokenizer(config)
    assert one.fingerprint == two.fingerprint and one.vocab_size == 300 and one.chat_template is None
    folder = next((Path(config.cache) / "tokenizers").iterdir())
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "special_tokens_map.json").unlink()  # as a kill left it before folders were whole
    (folder / "tokenizer.json").write_text("{")
    load_tokenizer(config)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole and len(list(folder.parent.iterdir())) == 1


def test_chat_data_bring_a_template(config, tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    config.source = str(tmp_path / "chat.jsonl")
    assert load_tokenizer(config).chat_template == DEFAULT_TEMPLATE


def test_prepare_shows_the_data(tmp_path, capsys):
    from tools import prepare

    file = tmp_path / "c.py"
    lines = ["from configs import base", "def get_config():", "    return base.get_config()"]
    file.write_text("\n".join(lines))
    source = "--config.data.source=synthetic:add?n=400&digits=2"
    argv = [f"--config={file}", source, f"--config.data.cache={tmp_path}", "--config.model.shape=tiny"]
    assert prepare.main(argv) == 0
    shown = capsys.readouterr().out
    assert "400" in shown and "full" in shown and "<|eos|>" in shown and "\x1b" not in shown
    assert prepare.main([f"--config={file}", "--config.model.shape=tiny", "--config.data.source=nonesuch"]) == 2
    assert "nonesuch" in capsys.readouterr().err
