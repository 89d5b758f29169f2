"""People's votes: kept, folded, measured and exported, whatever the answers contain and however often it is killed."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data import dataset
from data.text import formats as tokenizers
from feedback import agreement, exchange, export, load, main, rows, server, votes
from feedback.items import dense, item, read
from feedback.store import Stale, Store
from tests.helpers.feedback import RECORDS, Client, serving
from tests.helpers.processes import ROOT, environment

PAIR, RANK, GOLD = map(item, RECORDS)


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(Store(tmp_path / "votes.db")) as store:
        store.add([PAIR, RANK, GOLD])
        yield store


def content(asked, ranks=None, **more):
    given = {"choice": "ranks" if ranks else "skip", "ranks": ranks, "ms": 1000} | more
    return votes.decision(given, asked, list(range(len(asked.texts))), 1)


def vote(store, name, asked, ranks=None, version=None, **more):
    return store.append("vote", name, asked.hash, version, content(asked, ranks, **more))


# --- items ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answers": ["one"]}, "2 to 4 answers"),
        ({"answers": None}, "2 to 4 answers"),
        ({"answers": ["a", 5]}, r"answers\[1\] is neither"),
        ({"prompt": 7}, "column 'prompt' is not a list of messages"),
        ({"gold": [1]}, "gold is not a list of 2 ranks"),
        ({"gold": [0, 1]}, "whole numbers from 1"),
        ({"judge": "A"}, "column 'judge'"),
        ({"aspects": [1]}, "column 'aspects'"),
        ({"answers": ["x" * (9 << 20), "y"]}, "million characters"),
    ],
)
def test_a_row_that_is_no_item_is_one_line(tmp_path, change, message):
    (tmp_path / "i.jsonl").write_text(json.dumps({"prompt": "p", "answers": ["a", "b"]} | change))
    with pytest.raises(UserError, match=message) as error:
        list(read(str(tmp_path / "i.jsonl")))
    assert "i.jsonl:1" in str(error.value) and len(str(error.value)) < 500


def test_aspects_of_all_items(tmp_path):
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, RECORDS[:2])))
    assert [asked.aspects for asked in read(str(tmp_path / "i.jsonl"), ["honest"])] == [["honest"], ["true"]]


def test_ranks_have_no_gaps():
    assert dense([3, 7, None, 3]) == [1, 2, None, 1]


# --- events ---


def test_events_are_only_appended_and_count_once(store, tmp_path):
    first = vote(store, "ann", PAIR, [1, 2], 0, key="tab 1")
    assert vote(store, "ann", PAIR, [1, 2], 0, key="tab 1").id == first.id  # the same request again
    with pytest.raises(Stale):
        vote(store, "ann", PAIR, [2, 1], 0, key="tab 2")
    with pytest.raises(Stale):
        vote(store, "ann", PAIR, [2, 1], 1)  # decided already
    for statement in ("UPDATE events SET annotator = 'x'", "DELETE FROM events"):
        with pytest.raises(sqlite3.DatabaseError, match="only appended"):
            store.db.execute(statement)
    other = Store(tmp_path / "votes.db")  # as of another process
    vote(other, "bob", PAIR, [2, 1])
    assert set(store.state.votes[PAIR.hash]) == {"ann", "bob"}
    store.append("undo", "ann", PAIR.hash, 1, {})
    with pytest.raises(Stale):
        store.append("undo", "ann", PAIR.hash, 2, {})  # nothing is left to undo
    vote(store, "ann", RANK, [1, 2, 3])
    vote(store, "ann", PAIR, [2, 1], 2)
    assert store.state.newest["ann"].item == PAIR.hash
    store.append("undo", "ann", PAIR.hash, 3, {})
    assert store.state.newest["ann"].item == RANK.hash  # the next to be undone
    vote(store, "ann", PAIR, [2, 1], 4)
    assert other.state.votes[PAIR.hash]["ann"].ranks == [2, 1]
    assert [e.kind for e in store.events()] == ["vote", "vote", "undo", "vote", "vote", "undo", "vote"]
    other.close()


def test_a_tombstone_hides_what_was_before_it(store):
    vote(store, "ann", PAIR, [1, 2])
    vote(store, "bob", PAIR, [2, 1])
    store.keep("ann", RANK.hash, {"choice": "skip"})
    assert store.erase("ann") == 1 and store.draft("ann", RANK.hash) is None
    assert rows.rows([PAIR], store.state)["preference"][0]["chosen"] == "5"
    vote(store, "ann", PAIR, [1, 2])  # they may come back
    assert set(store.state.votes[PAIR.hash]) == {"ann", "bob"}


def test_another_file_is_no_database(tmp_path):
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        Store(tmp_path / "text")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="another program's database"):
        Store(tmp_path / "other.db")


# --- rows ---


def test_votes_become_rows(store):
    """Two for the first answer, one against; a correction; a partial ranking with a tie; a rating of 2 and one of 4."""
    for name, ranks in (("ann", [1, 2]), ("bob", [1, 2]), ("eve", [2, 1])):
        vote(store, name, PAIR, ranks, edits={"0": "four"} if name == "ann" else {})
    vote(store, "ann", RANK, [1, None, 1], ratings={"true": [2, None, None]})
    vote(store, "bob", RANK, [1, 2, 2], ratings={"true": [4, None, None]}, flags={"1": "nonsense"})
    vote(store, "ann", GOLD, [1, 2])
    found = rows.rows(store.items.values(), store.state)
    color, red = RECORDS[1]["prompt"], [{"role": "assistant", "content": "red"}]
    assert found["preference"][0] == {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}
    assert [row["rejected"][0]["content"] for row in found["preference"][1:]] == ["loud", "blue"]
    # Red won once against each and was tied with blue once; loud and blue were tied.
    assert [row["ranks"] for row in found["rankings_3"]] == [[1, 2, 2]]
    assert found["kto"][:2] == [
        {"prompt": "What is 2+2?", "completion": "4", "label": True},
        {"prompt": "What is 2+2?", "completion": "5", "label": False},
    ]
    assert found["ratings_true"] == [{"prompt": color, "completion": red, "rating": 3.0}]
    assert found["corrections"] == [{"prompt": "What is 2+2?", "chosen": "four", "rejected": "4"}]
    assert len(rows.rows(store.items.values(), store.state, each=True)["rankings_2"]) == 3
    store.append("resolve", "owner", PAIR.hash, None, content(PAIR, [2, 1]))
    assert rows.rows([PAIR], store.state, each=True)["preference"][0]["chosen"] == "5"
    store.append("undo", "owner", PAIR.hash, None, {})
    for name in ("ann", "bob"):
        store.append("undo", name, PAIR.hash, None, {})
        store.append("vote", name, PAIR.hash, None, content(PAIR) | {"choice": "bad"})
    bad = rows.rows([PAIR], store.state)
    assert [row["label"] for row in bad["kto"]] == [False, False] and "preference" not in bad


FORMS = {"kto": "labelled", "ratings_true": "rated"}


def test_every_file_of_an_export_is_read_by_training(store, tmp_path, capsys):
    for seed, name in enumerate(("ann", "bob")):
        vote(store, name, PAIR, [1, 2], edits={"0": "four"}, flags={"1": "wrong"})
        vote(store, name, RANK, [1, 2, 3], ratings={"true": [5, 1, 4 - seed]}, edits={"1": "green"})
    assert export.main([f"--db={store.path}", f"--out={tmp_path}/out"]) == 0
    names = sorted(path.stem for path in (tmp_path / "out").iterdir())
    assert names == [
        "corrections", "flags", "kto", "preference", "preference_ties", "rankings_2", "rankings_3", "ratings_true",
        "sft", "sft_corrections",
    ]  # fmt: skip
    for name in set(names) - {"flags"}:
        path = str(tmp_path / f"out/{name}.jsonl")
        made = dataset.prepare(path, tokenizers.load("bytes"), folder=tmp_path / "cache", form=FORMS.get(name, "auto"))
        assert len(made) and not made.report["bad"] and not made.report["unused"], name
    store.erase("ann")
    store.erase("bob")
    vote(store, "ann", PAIR, [1, 2])
    export.main([f"--db={store.path}", f"--out={tmp_path}/out"])
    assert not (tmp_path / "out/corrections.jsonl").exists()  # nothing erased is left behind


@pytest.mark.parametrize("form", exchange.WRITERS)
def test_other_tools_files_bring_the_same_votes_back(store, tmp_path, form):
    vote(store, "ann", PAIR, [1, 1], edits={"1": "four"}, flags={"0": "why"})
    vote(store, "bob", PAIR)
    vote(store, "ann", RANK, [2, None, 1], ratings={"true": [5, None, 4]})
    vote(store, "bob", RANK, [3, 1, 2])
    vote(store, "eve", RANK, [None] * 3, ratings={"true": [1, 1, 1]})
    assert export.main([f"--db={store.path}", f"--out={tmp_path}", f"--format={form}"]) == 0
    argv = [f"--db={tmp_path}/again.db", f"--file={tmp_path}/{form}.json"]
    assert load.main(argv) == 0 and load.main(argv) == 0
    again = Store(tmp_path / "again.db")
    assert [i.content for i in again.items.values()] == [i.content for i in store.items.values()]
    assert len(again.events()) == 5
    view = lambda s: {
        (name, key): [event.content[part] for part in ("choice", "ranks", "ratings", "edits", "flags", "model")]
        for name, found in s.state.votes.items()
        for key, event in found.items()
    }
    assert view(again) == view(store)
    again.close()


ARGILLA = {
    "id": "1", "fields": {"instruction": "Hi", "response_1": "a", "response_2": "b"},
    "responses": {"preference": [{"value": ["response_2", "response_1"], "user_id": "u1"}]},
}  # fmt: skip
STUDIO = {"completed_by": 3, "result": [{"from_name": "p", "type": "pairwise", "value": {"selected": "right"}}]}
RANKER = {
    "completed_by": {"email": "x@y"},
    "result": [{"from_name": "r", "type": "ranker", "value": {"ranker": {"_": [], "rank": ["m2", "m1"]}}}],
}


@pytest.mark.parametrize(
    "record, who",
    [
        (ARGILLA, "u1"),
        ({"data": {"prompt": "Hi", "answer1": "a", "answer2": "b"}, "annotations": [STUDIO]}, "3"),
        (
            {
                "data": {"prompt": "Hi", "items": [{"id": "m1", "body": "a"}, {"id": "m2", "body": "b"}]},
                "annotations": [RANKER],
            },
            "x@y",
        ),
    ],
)
def test_records_that_were_made_there_are_read(tmp_path, record, who):
    (tmp_path / "f.json").write_text(json.dumps([record]))
    [(asked, [(name, given)])] = exchange.read(tmp_path / "f.json")
    assert asked.texts == ["a", "b"] and name == who and given["ranks"] == [2, 1]


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"fields": {}}]', '[{"data": 1}]', "[", '[{"fields": []}]', "\xff"])
def test_other_files_are_refused_in_one_line(tmp_path, text, capsys):
    (tmp_path / "f.json").write_text(text, "latin-1")
    assert load.main([f"--db={tmp_path}/v.db", f"--file={tmp_path}/f.json"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- agreement ---

FLEISS = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
            7 7 0 0 0   3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""
CODERS = ["*****34121133*3", "1*213343*******", "**21344*21133*4"]


def test_agreement_of_published_examples():
    assert agreement.cohen([[20, 5], [10, 15]]) == pytest.approx(0.4)
    counts = np.array(FLEISS.split(), float).reshape(10, 5)
    assert agreement.fleiss(counts) == pytest.approx(0.2099, abs=5e-5)
    columns = list(zip(*CODERS))
    assert len(columns) == 15
    table = np.array([[column.count(c) for c in "1234"] for column in columns], float)
    assert agreement.alpha(table) == pytest.approx(0.6914, abs=5e-5)
    assert agreement.alpha(table, "interval") == pytest.approx(0.8108, abs=5e-5)
    figure = agreement.interval(agreement.alpha, table, range(15))
    assert figure.low < figure.value < figure.high and figure.n == 15
    seen = []
    agreement.interval(lambda x: seen.append(x.tolist()) or 0.0, np.array([1, 2, 3, 4]), [7, 9, 7, 9])
    assert {tuple(rows) for rows in seen} == {(1, 3, 1, 3), (1, 3, 2, 4), (2, 4, 1, 3), (2, 4, 2, 4), (1, 2, 3, 4)}
    assert agreement.interval(agreement.alpha, table[:1], [0]).value is None


def test_agreement_of_votes(store):
    for name, pair, rank in (("ann", [1, 2], [1, 2, 3]), ("bob", [1, 2], [1, 3, 2]), ("eve", [2, 1], None)):
        vote(store, name, PAIR, pair)
        vote(store, name, RANK, rank)
    found = agreement.of_all(agreement.units(store.state, store.items.values()))
    # Of the pair 1 of 3 agreements; of the ranking, which eve skipped, 2 of its 3 pairs.
    assert found["share"].value == pytest.approx((1 / 3 + 1 + 1 + 0) / 4) and found["share"].n == 4
    pairs = agreement.of_pairs(agreement.units(store.state, store.items.values()))
    assert pairs["ann", "bob"].n == 4 and pairs["ann", "eve"].n == 1
    assert agreement.with_others(agreement.units(store.state, store.items.values()), "ann").value == 3 / 5
    events = [e for e in store.state.of("ann") if e.item == PAIR.hash]
    assert agreement.first_shown(events).value == 1
    assert agreement.with_ranks([(events[0], [2, 1])]).value == 0


# --- the server ---


def test_only_the_page_itself_can_vote(tmp_path):
    with serving(tmp_path / "v.db") as (store, people):
        ann = people["ann"]
        assert ann.get()[0] == 200 and Client(ann.port, "x" * 32).get()[0] == 404
        assert ann.get(Host="evil.example")[0] == 403 and ann.get(Host=f"127.0.0.1:{ann.port + 1}")[0] == 403
        value = {"item": PAIR.hash, "version": 0, "choice": "bad"}
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{ann.port + 1}", ""):
            assert ann.post("vote", value, Origin=origin)[0] == 403
        assert ann.ask("POST", f"/{ann.token}/vote", b"{}", Content_Type="application/json")[0] == 403
        assert ann.post("vote", value, Content_Type="text/plain")[0] == 415
        assert not store.events()
        for path in ("settle", "people/bob", "nothing", "answer?item=x&place=0"):
            assert ann.get(path)[0] == 404
        for broken in ({}, [], value | {"version": "0"}, value | {"item": "no"}, value | {"choice": "x"},
                       value | {"ms": -1}, value | {"flags": {"7": "x"}}, value | {"edits": 3},
                       value | {"choice": "ranks", "ranks": [1]}, value | {"choice": "ranks", "ranks": [None, 1]},
                       value | {"edits": {"0": "\ud800"}}):  # fmt: skip
            assert ann.post("vote", broken)[0] in (400, 404), broken
        connection = http.client.HTTPConnection("127.0.0.1", ann.port)
        with contextlib.closing(connection):
            connection.request("GET", f"/{ann.token}/")
            headers = connection.getresponse().headers
        assert "script-src 'self'" in headers["Content-Security-Policy"] and headers["Referrer-Policy"] == "no-referrer"
        assert not store.events() and people["owner"].get("people/ann")[0] == 200


def test_behind_a_proxy_its_address_is_the_only_other_one(tmp_path):
    with serving(tmp_path / "v.db", base="https://team.example/feedback") as (_, people):
        assert people["ann"].get(Host="team.example")[0] == 200 and people["ann"].get(Host="team.example:1")[0] == 403
        asked = {"item": PAIR.hash, "version": 0, "choice": "bad"}
        assert people["ann"].post("vote", asked, Host="team.example", Origin="https://team.example")[0] == 200


def test_answers_are_blinded_and_the_judge_is_silent_until_the_vote(tmp_path):
    with serving(tmp_path / "v.db") as (store, people):
        page = people["ann"].get()[1]
        assert not any(word in page for word in ("arithmetic", "temperature", "sampling", "gold"))
        at = votes.shown("ann", PAIR)
        given = [1 if answer == 0 else 2 for answer in at]  # the first answer of the item, wherever it is shown
        assert people["ann"].vote(PAIR.hash, given)[0] == 200
        event = store.state.votes[PAIR.hash]["ann"]
        assert event.ranks == [1, 2] and event.content["order"] == at and event.content["model"] == ["a", "b"]
        assert "arithmetic" in people["ann"].get()[1] and "arithmetic" not in people["bob"].get()[1]
        assert people["ann"].vote(PAIR.hash, given)[0] == 200  # the same request again
        assert people["ann"].vote(PAIR.hash, given, key="another tab")[0] == 409
        assert people["ann"].post("undo", {"item": PAIR.hash, "version": 1})[0] == 200
        assert store.draft("ann", PAIR.hash)["ranks"] == given
        assert people["ann"].vote(PAIR.hash, given, version=2)[0] == 200
        assert store.state.votes[PAIR.hash]["ann"].content["informed"]
    orders = {tuple(votes.shown(name, RANK)) for name in "abcdefghijklmnopqrstuvwxyz"}
    assert len(orders) == 6


def test_items_go_to_as_many_people_as_wanted(tmp_path):
    with serving(tmp_path / "v.db", wanted=1) as (_, people):
        first, second = people["ann"].get()[1], people["bob"].get()[1]
        assert PAIR.hash in first and RANK.hash in second  # one is being looked at
        assert people["ann"].vote(PAIR.hash, [1, 2])[0] == 200
        assert GOLD.hash in people["ann"].get()[1]  # gold is for everybody
        people["ann"].vote(GOLD.hash, [1, 2])
        assert "All done" in people["ann"].get()[1]


def test_disagreements_are_resolved_by_the_owner(tmp_path):
    with serving(tmp_path / "v.db") as (store, people):
        at = {name: votes.shown(name, PAIR) for name in ("ann", "bob", "owner")}
        for name, best in (("ann", 0), ("bob", 1)):
            people[name].vote(PAIR.hash, [1 if answer == best else 2 for answer in at[name]])
        page = people["owner"].get("settle")[1]
        assert "A &gt; B" in page and "B &gt; A" in page and "Resolve 1" in people["owner"].get()[1]
        assert people["owner"].vote(PAIR.hash, [1 if answer == 1 else 2 for answer in at["owner"]])[0] == 200
        assert store.state.resolved[PAIR.hash].ranks == [2, 1]
        assert "No disagreement is left" in people["owner"].get("settle")[1]


HOSTILE = [
    "<script>alert(1)</script>",
    "{{ 7*7 }}",
    "a\u202eb\u2066c\u200bd",
    "\x00\x1b[31m",
    "]]>",
    "&lt;b>",
    "\U000e0041",
]


def test_whatever_a_model_writes_is_shown_as_text(tmp_path):
    assert server.shown("a\u202eb<") == 'a<span class="unseen">U+202E</span>b&lt;'
    assert len(server.shown("\u200b" * 100_000)) < 1_500_000
    for text in ("word " * 5000, "x" * 20_000, "line\n" * 5000):
        assert "".join(server.cut(text)) == text and max(map(len, server.cut(text))) <= server.PART
    records = [
        {"prompt": text, "answers": [text, text + "!"], "judge": {"ranks": [1, 2], "model": text, "why": text}}
        for text in HOSTILE
    ]
    records += [{"prompt": "big", "answers": ["\u202e<" * 250_000, "x " * 250_000], "judge": {"ranks": [1, 1]}}]
    with serving(tmp_path / "v.db", records=records) as (store, people):
        store.guide(HOSTILE[0])
        for name, asked in store.items.items():
            status, page = people["ann"].get(f"?item={name}")
            assert status == 200 and "<script>alert" not in page and ">49<" not in page and "\u202e" not in page
            place = votes.shown("ann", asked).index(0)
            status, text = people["ann"].get(f"answer?item={name}&place={place}")
            assert text == asked.texts[0]
            texts = {"flags": {"0": asked.texts[0]}, "edits": {"1": asked.texts[0] + "?"}}
            assert people["ann"].vote(name, [1, 2], **texts)[0] == 200
            for page in (people["ann"].get()[1], people["ann"].get("me")[1], people["owner"].get("people/ann")[1]):
                assert "<script>alert" not in page and "\u202e" not in page


def test_drafts_are_kept_until_the_vote(tmp_path):
    with serving(tmp_path / "v.db") as (store, people):
        given = {"item": PAIR.hash, "version": 0, "choice": "bad", "ranks": [None, None]}
        assert people["ann"].post("draft", given)[0] == 200
        saved = '"choice": "bad"'
        assert saved in people["ann"].get()[1] and saved not in people["bob"].get()[1]
        assert people["ann"].post("vote", given)[0] == 200 and store.draft("ann", PAIR.hash) is None
        assert people["ann"].post("draft", given)[0] == 409  # an old tab


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no items"),
        (["--items=none.jsonl"], "none.jsonl"),
        (["--base-url=team.example"], "is not an address"),
        (["--annotators=owner"], "has a link already"),
        (["--annotators=a/b", "--items=i.jsonl"], "cannot be a name"),
        (["--erase=ann"], "nobody is called 'ann'"),
        (["--votes=x"], "--votes"),
        (["--port=99999", "--items=i.jsonl"], "99999 is not a port"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("i.jsonl").write_text(json.dumps(RECORDS[0]))
    assert main.main(["--db=v.db", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


# --- kills, and many people at once ---


def start(folder: Path, *more: str) -> tuple[subprocess.Popen, dict[str, Client]]:
    command = [sys.executable, "-m", "feedback.main", f"--db={folder}/v.db", "--port=0", *more]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    people = {}
    for line in process.stdout:
        name, link, address = line.partition(": http://127.0.0.1:")
        if link:
            port, token, _ = address.split("/")
            people[name] = Client(int(port), token)
        if name == "owner":
            return process, people
    raise AssertionError("the server did not start")


@pytest.mark.slow
def test_20_kills_lose_no_accepted_vote(tmp_path):
    (tmp_path / "i.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{i}", "answers": ["a", "b"]}) for i in range(2000))
    )
    names = [asked.hash for asked in read(str(tmp_path / "i.jsonl"))]
    accepted: dict[str, set[str]] = {"ann": set(), "bob": set()}

    def work(client: Client, name: str) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            for asked in (n for n in names if n not in accepted[name]):
                status, _ = client.vote(asked, [1, 2])
                assert status in (200, 409)
                accepted[name].add(asked)

    for seed in range(20):
        process, people = start(tmp_path, *([] if seed else [f"--items={tmp_path}/i.jsonl", "--annotators=ann,bob"]))
        workers = [threading.Thread(target=work, args=(people[name], name)) for name in accepted]
        for worker in workers:
            worker.start()
        timer = threading.Timer(0.05 + random.Random(seed).random() * 0.3, os.kill, (process.pid, signal.SIGKILL))
        timer.start()
        process.wait(60)
        for worker in workers:
            worker.join()
    store = Store(tmp_path / "v.db")
    kept = {name: {e.item for e in store.events() if e.annotator == name} for name in accepted}
    assert sum(map(len, accepted.values())) > 50
    assert all(accepted[name] <= kept[name] for name in accepted)
    assert store.db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    store.close()


@pytest.mark.slow
def test_50_people_at_once(tmp_path):
    names = tuple(f"p{i}" for i in range(50))
    records = [{"prompt": f"{i}", "answers": ["a", "b"]} for i in range(20)]
    with serving(tmp_path / "v.db", names=names, records=records, wanted=5) as (store, people):
        problems: list[object] = []

        def work(client: Client) -> None:
            while asked := re.search(r'<main[^>]*\sdata-item="(\w+)"', client.get()[1]):
                if (status := client.vote(asked[1], [1, 2])[0]) != 200:
                    problems.append(status)

        workers = [threading.Thread(target=work, args=(people[name],)) for name in names]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        counts = [len(found) for found in store.state.votes.values()]
        assert not problems and counts == [5] * 20 and len(store.events()) == 100
