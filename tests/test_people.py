"""Sampled answers, rewards, judges and the router: from prompts to what people are asked and what their labels buy."""

import json

import numpy as np
import pytest

from common.errors import UserError
from data import formats
from evals import answers, judge, pairs, reward, router
from infer.hosted import parse
from infer.models import load
from model.io.export import export_hf
from tests.cases import people
from tests.helpers.adapters import make
from tests.helpers.serving import scripted
from tools import judge as tool
from tools import rank, route, sample_pairs


def rows(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines(path):
    return list(map(json.loads, path.read_text().split("\n")[:-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a chat template."""
    path = tmp_path_factory.mktemp("people") / "model"
    model, params, _ = make()
    export_hf(model, params, people.tokenizer(), path, check=False)
    return path


# --- prompts and answers ---

HH = "\n\nHuman: Q\n\nAssistant:"
ASKED = (
    ({"prompt": "Q"}, "Q"),
    ({"question": "Q", "answer": "A"}, "Q"),
    ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\n\nI"}]),
    ({"messages": [people.U, people.A]}, [people.U]),
    ({"messages": [people.S, people.U]}, [people.S, people.U]),
    (
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        "\n\nHuman: Q\n\nAssistant:",
    ),
    ({"text": "Q"}, "Q"),
)


def test_prompts_of_every_shape(tmp_path):
    source = rows(tmp_path / "x.jsonl", *(record for record, _ in ASKED))
    assert [prompt for _, prompt, _ in answers.prompts(source)] == [prompt for _, prompt in ASKED]
    with pytest.raises(UserError, match=r"y.jsonl.*the row has no prompt"):
        list(answers.prompts(rows(tmp_path / "y.jsonl", {"a": 1})))


def test_sampled_items_are_the_same_after_a_kill(folder, tmp_path, capsys):
    source = rows(tmp_path / "prompts.jsonl", *({"prompt": f"{i}+1="} for i in (*range(20), 3)))
    command = [f"--prompts={source}", f"--models={folder}", "--max_new_tokens=4", "--temperature=4"]
    assert sample_pairs.main([*command, f"--out={tmp_path}/a.jsonl"]) == 0
    whole = (tmp_path / "a.jsonl").read_bytes()
    items = lines(tmp_path / "a.jsonl")
    assert len(items) == 20 and all(len({a["text"] for a in item["answers"]}) == 2 for item in items)
    drawn = load(folder).generate([[{"role": "user", "content": "0+1="}]] * 2, max_new_tokens=4, temperature=4.0)
    assert [a["text"] for a in items[0]["answers"]] == drawn
    for kept in (200, len(whole) - 5):
        (tmp_path / "b.jsonl").write_bytes(whole[:kept])
        assert sample_pairs.main([*command, f"--out={tmp_path}/b.jsonl"]) == 0
        assert (tmp_path / "b.jsonl").read_bytes() == whole
    assert sample_pairs.main([*command, "--seed=1", f"--out={tmp_path}/b.jsonl"]) == 2
    assert "other items than answers of these models" in capsys.readouterr().err


def test_answers_are_ranked_into_rows_to_train_on(folder, tmp_path, capsys):
    """Of four answers to 2+2= the best and the worst are kept; a prompt with equal rewards has no pair."""
    said = lambda *texts: [{"text": text, "model": "ab"[i % 2]} for i, text in enumerate(texts)]
    items = [
        {"prompt": "2+2=", "answers": said("4", "five", "5 or 4", "x"), "references": ["4"]},
        {"prompt": "1+2=", "answers": said("3", "3", "3", "3"), "answer": "3"},
    ]
    source, command = rows(tmp_path / "items.jsonl", *items), ["--reward=scorer:number,0.1*rule:length?most=1"]
    command.append(f"--items={source}")
    for keep, wanted in {
        "best": [{"prompt": "2+2=", "completion": "4"}, {"prompt": "1+2=", "completion": "3"}],
        "pairs": [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}],
        "items": [i | {"judge": {"model": command[0][9:], "ranks": r}} for i, r in zip(items, ([1, 3, 2, 3], [1] * 4))],
    }.items():
        assert rank.main([*command, f"--keep={keep}", f"--out={tmp_path}/o.jsonl"]) == 0
        assert lines(tmp_path / "o.jsonl") == wanted
        assert all(formats.example(row) for row in lines(tmp_path / "o.jsonl") if keep != "items")
    out = capsys.readouterr().out
    assert "b wins 25 %" in out and "best of 4: mean reward 1.100, KL from the model <= 0.636 nats" in out
    assert rank.main([*command, "--keep=best"]) == 2
    both = [f"--prompts={source}", f"--models={folder},{folder}+none", f"--out={tmp_path}/both.jsonl"]
    assert sample_pairs.main(both) == 2  # there is no such adapter


def test_kl_is_the_mean_log_ratio_of_the_second_model(folder, tmp_path, capsys):
    lm, prompts = load(folder), [{"role": "user", "content": "2+2="}]
    items = [{"prompt": prompts, "answers": [{"text": t, "model": m} for t, m in (("a", ""), ("bcd", str(folder)))]}]
    other = tmp_path / "other"
    model, params, _ = make()
    params = params | {"embed": {"table": params["embed"]["table"] * 0.5}}
    export_hf(model, params, people.tokenizer(), other, check=False)
    source = rows(
        tmp_path / "items.jsonl", items[0] | {"answers": [{"text": "a", "model": str(other)}, items[0]["answers"][1]]}
    )
    assert rank.main([f"--items={source}", "--reward=rule:ends", "--kl"]) == 0
    [(ours, _)], [(theirs, _)] = (one.logps([prompts], ["bcd"]) for one in (lm, load(other)))
    assert f"{ours - theirs:.3g} nats per answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, problem",
    [
        (["--models=a,b,c"], "one or two"),
        (["--models=a,b", "--answers=3"], "an even number"),
        (["--temperature=0"], "equal at temperature 0"),
        (["--prompts=nothing.jsonl"], "no such source"),
    ],
)
def test_settings_of_sampling_are_checked_first(more, problem, tmp_path, capsys):
    source = rows(tmp_path / "x.jsonl", {"prompt": "Q"})
    assert sample_pairs.main([f"--prompts={source}", "--models=m", f"--out={tmp_path}/o", *more]) == 2
    assert problem in capsys.readouterr().err


# --- rewards ---

ANSWERS = ["It is 4.", "four four four four four four four", ""]


def test_rewards_are_weighted_sums_of_their_parts(tmp_path, monkeypatch):
    rows = [{"answer": "4"}, {"references": ["4", "four"]}, {"completion": "4"}]
    give = lambda spec: reward.load(spec)(["2+2="] * 3, ANSWERS, rows)
    assert give("scorer:number") == [1, 0, 0]
    assert give("rule:length?most=4") == [1, 0.25, 1]
    assert give("rule:unrepeated") == [1, 0.25, 1]
    assert give("rule:ends") == [1, 0, 0]
    assert give("2*scorer:number,-1*rule:length?most=4") == [1, -0.25, -1]
    (tmp_path / "mine.py").write_text("def size(prompts, answers, rows): return map(len, answers)")
    (tmp_path / "mine.py").open("a").write("\ndef odd(prompts, answers, rows): return [float('nan')] * len(answers)\n")
    monkeypatch.chdir(tmp_path)
    assert give("0.5*mine:size") == [4, 17, 0]
    many = reward.load("mine:size")(["Q"] * 200, ["x" * i for i in range(200)], [{}] * 200)
    assert many == list(range(200))
    for spec, problem in {
        "mine:odd": "one finite reward", "mine:none": "cannot be imported", "scorers:exact": "did you mean scorer",
        "scorer:exakt": "exact", "rule:length": "no rule", "length": "is not", "x*rule:ends": "is not",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=problem):
            give(spec)
    with pytest.raises(UserError, match="no answer to compare"):
        reward.load("scorer:exact")(["Q"], ["A"], [{}])


# --- judges ---


def test_a_judge_is_asked_in_both_orders(folder):
    mine = judge.Judge("m", load(folder))
    first, second = mine.compare(["Q", "Q"], ["one", "two"], ["two", "one"])
    assert first.p == pytest.approx(1 - second.p, abs=1e-5) and first.votes == tuple(-v for v in second.votes[::-1])
    grades = mine.rate(["Q"] * 3, ["one", "two", "one"])
    assert all(0 < grade < 1 for grade in grades) and grades[0] == pytest.approx(grades[2], abs=1e-6)


def test_position_bias_of_a_hosted_judge_is_seen():
    def always(letter):
        return 200, {}, lambda body: {"choices": [{"message": {"content": f"I say {letter}."}}]}

    def longer(body):
        asked = body["messages"][0]["content"]
        a, b = (asked.partition(f"[answer {x}]")[2].partition("[")[0] for x in "AB")
        return {"choices": [{"message": {"content": "A" if len(a) > len(b) else "B"}}]}

    asked = ["Q"] * 2, ["longer", "longer"], ["short", "short"]
    for reply, winner, p, bias in (
        (always("A"), 0, 0.5, (1.0, 1.0)), (always("D"), 0, 0.5, (None, 0.0)), ((200, {}, longer), 1, 1.0, (0.5, 0.0)),
    ):  # fmt: skip
        with scripted(reply) as (url, _):
            theirs = judge.Judge("x", parse(f"openai:{url}#m"))
            verdicts = theirs.compare(*asked)
        assert [v.winner for v in verdicts] == [winner] * 2 and verdicts[0].p == p and judge.bias(verdicts) == bias
    assert theirs.unread == 0


# --- pairs ---


def test_votes_of_several_people_on_a_pair_are_one_pair(tmp_path):
    """Two of three prefer A: of the three pairs of people one agrees. A ranking of three is three pairs."""
    vote = lambda chosen, rejected: {"prompt": "Q", "chosen": chosen, "rejected": rejected}
    ranked = {"prompt": "R", "answers": ["u", "v", "w"], "ranks": [2, 1, 2]}
    found = pairs.read(rows(tmp_path / "x.jsonl", vote("B", "A"), vote("A", "B"), vote("A", "B"), ranked))
    assert found[0] == pairs.Pair("Q", "A", "B", (-1, 1, 1))
    assert [(p.chosen, p.rejected, p.votes) for p in found[1:]] == [
        ("v", "u", (1,)),
        ("v", "w", (1,)),
        ("u", "w", (0,)),
    ]
    assert pairs.agreement(found) == [0, 0, 1]
    assert pairs.ceiling(1) == 1 and pairs.ceiling(0.5) == 0.5 and pairs.ceiling(0.82) == pytest.approx(0.9)


def test_predictors_that_read_no_model():
    """Words decide: "good" is preferred to "bad"; the length does not."""
    rng = np.random.default_rng(0)
    noise = lambda: " ".join(rng.choice(["a", "b", "c", "d"], rng.integers(1, 9)))
    found = [pairs.Pair(f"{i}?", f"good {noise()}", f"bad {noise()}") for i in range(100)]
    assert np.mean(pairs.correct(pairs.bag_of_words(found))) > 0.95
    assert 0.3 < np.mean(pairs.correct(pairs.longest(found))) < 0.7
    assert pairs.correct(np.array([0.7, 0.2, 0.5])) == [1, 0, 0.5]
    w = pairs.logistic(np.array([[1.0], [1.0], [-1.0]]), l2=1e-6)  # two of three: the odds are 2
    assert w == pytest.approx(np.log(2), abs=1e-3)


# --- the table and the router ---


@pytest.mark.slow
def test_judges_stand_beside_what_reads_no_model(folder, tmp_path, capsys):
    votes = [{"prompt": f"{i}?", "chosen": "good one", "rejected": f"bad {i}"} for i in range(12)]
    against = votes[4] | {"chosen": "bad 4", "rejected": "good one"}
    source = rows(tmp_path / "x.jsonl", *votes, *votes[:4], against, votes[4], votes[11] | {"prompt": "tie", "tie": 1})
    command = [f"--pairs={source}", f"--out={tmp_path}/out", f"--features={folder}", "--rewards=rule:length?most=1"]
    command += ["--label_seconds=36", "--wage=10"]
    with scripted((200, {}, lambda body: {"choices": [{"message": {"content": "A"}}], "usage": USAGE})) as (url, asked):
        command.append(f"--judges={folder},openai:{url}#m?in=1&out=10")
        assert tool.main(command) == 0
        assert tool.main(command) == 0  # all verdicts are kept
    assert len(asked) == 24
    found = json.loads((tmp_path / "out/judges.json").read_text())["rows"]
    table = {row["label"].split()[0]: row for row in found}
    assert (table["agreement"]["mean"], table["agreement"]["n"], table["agreement"]["usd"]) == (
        pytest.approx(5 / 7),
        7,
        0.1,
    )
    assert table["highest"]["mean"] == pytest.approx((1 + (3 / 7) ** 0.5) / 2)
    assert table["bag"]["mean"] > 0.9 and table["linear"]["n"] == table["the"]["n"] == 12
    hosted = found[-1]
    assert (hosted["mean"], hosted["undecided"], hosted["first"], hosted["differ"]) == (0.5, 1, 1, 1)
    assert hosted["usd"] == pytest.approx(2 * (5 + 10) / 1e6)
    assert "judge openai" in capsys.readouterr().out


USAGE = {"prompt_tokens": 5, "completion_tokens": 1}


def test_the_unsure_and_a_random_share_go_to_people():
    p = np.linspace(0, 1, 101)
    found = router.route(p, people=20, audit=0.25)
    assert found.unsure.sum() == 15 and found.audited.sum() == 5 and not (found.unsure & found.audited).any()
    assert np.abs(p[found.unsure] - 0.5).max() <= 0.08
    others = [router.route(p, 20, 0.25, seed).audited for seed in range(200)]
    assert np.mean([p[a].mean() for a in others]) == pytest.approx(0.5, abs=0.05)
    assert router.route(p, 1000, 0.1).people.all()


def test_calibration_by_hand():
    """Confidence 0.9 and right in 3 of 4; 0.6 and right in 1 of 2."""
    found = router.calibration([0.9, 0.1, 0.9, 0.9, 0.6, 0.4], [1, 0, 1, 0, 1, 1])
    assert found.accuracy == pytest.approx(4 / 6) and [b[1] for b in found.bins] == [2, 4]
    assert found.error == pytest.approx((2 * 0.1 + 4 * 0.15) / 6)
    assert found.brier == pytest.approx((3 * 0.01 + 0.81 + 0.16 + 0.36) / 6)


def test_a_label_buys_most_where_the_model_is_unsure():
    """Only two of thirty directions matter; labels of pairs far from the boundary say little."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 10)) * np.array([3, *[1] * 9])
    x *= np.sign(x[:, :1] + 0.7 * x[:, 1:2])
    fold, judge = np.arange(400) % 5, np.full(400, 0.5)
    found = {order: router.curve(x, fold, judge, order, [10, 40], replays=6, l2=1.0) for order in router.ORDERS}
    assert len({points[0].mean for points in found.values()}) == 1  # the first labels are the same
    assert found["uncertain"][1].mean > found["random"][1].mean > found["random"][0].mean > 0.6
    noisy = router.curve(x, fold, judge, "random", [40], replays=6, l2=1.0, noise=0.4)
    assert noisy[0].mean < found["random"][1].mean and noisy[0].low <= noisy[0].mean <= noisy[0].high


def test_people_are_asked_where_the_judge_is_unsure_and_check_it(folder, tmp_path, capsys):
    items = [
        {"prompt": f"{i}?", "answers": [{"text": f"good {i}"}, {"text": "long " * (1 + i % 3)}], "id": str(i)}
        for i in range(20)
    ]
    source, out = rows(tmp_path / "items.jsonl", *items), tmp_path / "out"
    assert route.main([f"--items={source}", f"--judge={folder}", "--people=10", "--audit=0.4", f"--out={out}"]) == 0
    asked, routes = lines(out / "people.jsonl"), lines(out / "routes.jsonl")
    assert len(asked) == 10 and sum(line["audited"] for line in routes) == 4
    assert all(item["judge"]["model"] == str(folder) for item in asked)
    assert {row["prompt"] for row in lines(out / "judged.jsonl")}.isdisjoint(item["prompt"] for item in asked)
    votes = [
        {"prompt": i["prompt"], "chosen": i["answers"][0]["text"], "rejected": i["answers"][1]["text"]} for i in asked
    ]
    assert route.main([f"--routed={out}", f"--votes={rows(tmp_path / 'votes.jsonl', *votes)}"]) == 0
    said = capsys.readouterr().out
    assert "drawn at random: the judge is right in" in said and "of 4; Brier" in said and "of 6; Brier" in said
    assert route.main([f"--items={source}"]) == 2 and route.main([]) == 2


def test_a_curve_of_labels(folder, tmp_path, capsys):
    source = rows(
        tmp_path / "x.jsonl", *({"prompt": f"{i}?", "chosen": f"good {i}", "rejected": f"b {i % 7}"} for i in range(40))
    )
    command = [f"--curve={source}", f"--features={folder}", "--labels=4,16", "--replays=3", f"--out={tmp_path}/out"]
    assert route.main([*command, "--label_seconds=30"]) == 0
    record = json.loads((tmp_path / "out/curve.json").read_text())
    assert record["uncertain"][1]["mean"] > 0.9 and len(record["random"][0]["replays"]) == 3
    assert "8:00" in capsys.readouterr().out and "<svg" in (tmp_path / "out/curve.html").read_text()
    assert route.main([*command, "--labels=4,400"]) == 2
