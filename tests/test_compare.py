"""tools.compare: which methods and settings stay, what the budget pays for, and the record of a comparison."""

import dataclasses
import json
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import exits, files
from common.errors import UserError
from common.jobs import Stage
from configs import schema
from data.text import formats as tokenizers
from evals import latency
from evals.run import choose
from infer import bundle, models
from infer.context import Context
from infer.retrieve import index
from infer.serve.batcher import Batcher
from model.io.export import export_hf
from tests.cases import people
from tests.helpers.adapters import make
from tests.helpers.encoders import encoder
from tests.helpers.models import TINY, random_model
from tests.helpers.processes import run, start, timeless
from tests.helpers.serving import running
from tools.compare import __main__ as command
from tools.compare import halving, inputs, plan, record, work
from tools.compare.engine import Engine
from tools.compare.inputs import Base, Comparison
from tools.compare.method import Candidate, Method, Setting


def candidate(name: str, lr: float = 0.0, model: str = "m") -> Candidate:
    setting = Setting({"lr": lr} if lr else {}, {"optim.lr": lr} if lr else None)
    return Candidate(f"{name}:{lr:g}", name, model, Method(name, ""), setting)


def by(values: Iterable) -> Callable[[Candidate], object]:
    """A function of candidates, from pairs."""
    found = {x.id: value for x, value in values}
    return lambda x: found[x.id]


def result(right: int, n: int = 40) -> dict:
    scores = [1.0] * right + [0.0] * (n - right)
    return {"mean": right / n, "n": n, "scores": scores, "rows": list(map(str, range(n))), "task_hash": "h"}


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\n" + "".join(f"what is {i}?,{i % 23}\n" for i in range(200)))
    base = Base("m", 512, 1e6, 8.0, 2.0, 20)
    return Comparison(inputs.read(str(rows)), {"m": base}, str(rows), 3.0, tmp_path)


# --- halving ---


def test_rungs_have_three_times_the_rows():
    found = halving.rungs(3, 900, 400)
    assert [(r["train"], r["rows"]) for r in found] == [(100, 50), (300, 100), (900, 200)]
    assert [r["train"] for r in halving.rungs(3, 100, 30)] == [34, 100]  # a ninth would be 12 rows
    assert halving.rungs(0, 900, 400) == []


def test_prompts_are_not_measured_again_on_the_same_rows(comparison):
    rungs = halving.rungs(3, 900, 100)
    assert [r["rows"] for r in rungs] == [50, 100, 100]
    zero, lora = candidate("zero_shot"), candidate("lora", 1e-3)
    assert halving.measured(zero, rungs) == [0, 1] and halving.measured(lora, rungs) == [0, 1, 2]
    engine, rows = object.__new__(Engine), [{"rung": 0, "result": "first"}, {"rung": 1, "result": "second"}]
    engine.r = SimpleNamespace(rungs=rungs, candidate=lambda name: {"rungs": rows})
    assert [engine._result(zero, n) for n in (-1, 0, 1, 2)] == [None, "first", "second", "second"]
    assert [engine._result(lora, n) for n in (1, 2)] == ["second", None]


def test_other_settings_of_a_trained_method_join_in_the_last_rung_but_one():
    rates, shots = [candidate("lora", lr) for lr in (1e-3, 3e-4)], [candidate("few_shot"), candidate("few_shot")]
    joins = lambda rungs: [halving.joining(x, [*rates, *shots], rungs) for x in (*rates, *shots)]
    assert joins(3) == [0, 1, 0, 0] and joins(2) == joins(1) == [0, 0, 0, 0]


def test_a_third_of_the_settings_stays_and_at_last_one():
    alive = [candidate("lora", lr) for lr in (1e-3, 3e-4, 3e-3, 1e-2)] + [candidate("zero_shot")]
    scores = by(zip(alive, map(result, (20, 30, 30, 1, 5)), strict=True))
    kept, dropped = halving.settings(alive, scores, last=False)
    assert [x.id for x in kept] == ["lora:0.0003", "lora:0.003", "zero_shot:0"]
    assert dropped[0].why == "50 % on 40 validation rows; lora, lr 0.0003 scored 75 %"
    kept, _ = halving.settings(alive, scores, last=True)
    assert [x.id for x in kept] == ["lora:0.0003", "zero_shot:0"]  # the first of equals


def test_before_the_last_rung_the_first_of_settings_within_one_standard_error_stays():
    """29 of 40 against 30 of the same 40 is one row of difference, and one standard error is about one row and a half
    (Newcombe's interval is -5.1 to +10.4 points)."""
    alive = [candidate("lora", lr) for lr in (1e-3, 3e-4, 3e-3)]
    for right, last, wanted in (29, False, 1e-3), (29, True, 3e-4), (20, False, 3e-4):
        scores = by(zip(alive, map(result, (right, 30, 10)), strict=True))
        [kept], _ = halving.settings(alive, scores, last)
        assert kept.id == f"lora:{wanted:g}"


def test_what_is_clearly_worse_stops():
    """Newcombe's interval of 30 against 10 of 40 nested rows is far above 0."""
    rag, shots, zero = candidate("rag"), candidate("few_shot"), candidate("zero_shot")
    everyone = [rag, shots, zero]
    scores = by(zip(everyone, map(result, (30, 10, 28)), strict=True))
    kept, [drop] = halving.methods(everyone, scores, lambda x: None, full=True)
    assert kept == [rag, zero] and drop.candidate == shots
    assert drop.why.startswith("rag is 50 points better on 40 validation rows (95 % interval ")
    scores = by(zip(everyone, map(result, (30, 28, 10)), strict=True))
    assert halving.methods(everyone, scores, lambda x: None, full=True)[0] == [rag, shots]


def test_training_on_a_part_of_the_rows_may_still_learn():
    rag, lora = candidate("rag"), candidate("lora", 1e-3)
    scores = by([(rag, result(36)), (lora, result(20))])
    drops = lambda before, full=False: halving.methods([rag, lora], scores, lambda x: before, full)[1]
    assert not drops(None)  # nothing is known about its gain
    assert not drops(result(0)) and drops(result(19)) and drops(None, full=True)


def test_the_budget_pays_the_best_first_and_reserves_a_test():
    lora, full, zero = candidate("lora", 1e-3), candidate("full", 1e-5), candidate("zero_shot")
    everyone = [zero, lora, full]
    scores = by(zip(everyone, map(result, (4, 36, 20)), strict=True))
    now, later = (by(zip(everyone, row, strict=True)) for row in ((1.0, 10.0, 20.0), (1.0, 30.0, 60.0)))
    assert halving.affordable(everyone, scores, now, later, None) == (everyone, [])
    assert halving.affordable(everyone, scores, now, later, 91.0)[0] == everyone  # 1 + 10 + 20, and 60 later
    kept, [drop] = halving.affordable(everyone, scores, now, later, 90.0)
    assert kept == [lora, full] and drop.why == "the budget has 0 FLOP left; this needs 2 FLOP"
    kept, [drop] = halving.affordable(everyone, scores, now, later, 89.0)
    assert kept == [zero, lora] and drop.why == "the budget has 49 FLOP left; this needs 80 FLOP"
    assert halving.affordable(everyone, scores, now, later, 40.0)[0] == [lora]  # the leader, before zero-shot
    assert halving.affordable(everyone, scores, now, later, 1.5)[0] == []
    assert halving.affordable(everyone, scores, now, later, 1.5, must=True)[0] == [lora]


def test_the_leader_is_the_cheapest_trained_one_of_the_best_and_without_results_the_first():
    everyone = full, lora, zero = candidate("full", 1e-5), candidate("lora", 1e-3), candidate("zero_shot")
    cost = by(zip(everyone, (3.0, 2.0, 1.0), strict=True))
    for right, wanted in ((30, 29, 10), lora), ((30, 20, 10), full), ((30, 30, 30), lora), ((20, 10, 30), zero):
        scores = by(zip(everyone, map(result, right), strict=True))
        assert halving.leader(everyone, scores, cost) == wanted
    assert halving.leader(everyone, lambda x: None, cost) == full


def test_further_settings_get_the_even_share_of_a_rung():
    rates = [candidate("lora", lr) for lr in (1e-3, 3e-4, 3e-3)] + [candidate("full", lr) for lr in (3e-5, 1e-5)]
    kept = lambda *share: halving.affordable(rates, lambda x: None, lambda x: 10.0, lambda x: 20.0, 100.0, *share)[0]
    assert kept() == rates  # 50 now, and 20 later
    assert kept(1 / 3) == [rates[0], rates[1], rates[3]]  # the first of each method, then one more for 33 FLOP
    _, drops = halving.affordable(rates[:3], lambda x: None, lambda x: 10.0, lambda x: 10.0, 25.0)
    assert [drop.why for drop in drops] == ["the budget has no room for more settings"] * 2


# --- plans ---


def test_budgets_and_prices():
    assert plan.budget("1e15", None) == (1e15, None)
    assert plan.budget("", None) == plan.budget("all", None) == (None, None)
    assert plan.budget("30min", None) == (None, 1800) and plan.budget("2 h", None) == (None, 7200)
    assert plan.budget("2usd", 4.0) == (None, 1800)
    assert plan.price("2") == [2, 2, 2] and plan.price("1:2:4") == [1, 2, 4] and plan.price("") is None
    for text in ("soon", "0", "-1h", "1e", "2usd"):
        with pytest.raises(UserError, match="budget"):
            plan.budget(text, None)
    for text in ("4:2:1", "1:2", "cheap", "nan"):
        with pytest.raises(UserError, match="price"):
            plan.price(text)


def test_a_request_costs_what_is_read_and_written(comparison):
    flops = plan.Prices(comparison, 3)
    x = Candidate("few", "few_shot", "m", Method("", ""), Setting({}, ask=Context(shots=4)))
    low, high = flops.ask(x, 10)
    assert low == 10 * 1e6 * (8 + 4 * 10 + 2) and high == 10 * 1e6 * (8 + 4 * 10 + plan.ROOM)
    assert flops.ask(x, 10, {"flops": 40.0, "n": 20}) == (20.0, 20.0)
    x = Candidate("few", "few_shot", "m", Method("", ""), Setting({}, ask=Context(shots=4, pick="fixed")))
    assert flops.ask(x, 10)[0] == 1e6 * (4 * 10 + 10 * (8 + 2))  # the examples once


def test_latency_leaves_compilation_out():
    calls: list[int] = []
    found = latency.measure(calls.append, 3, compiled=True)
    assert calls == [0, 0, 1, 1, 2, 2] and found["n"] == 3 and 0 <= found["p50"] <= found["p95"]
    latency.measure(calls.append, 2, compiled=False)
    assert calls[6:] == [0, 1]


@pytest.mark.parametrize("documents", [True, False])
def test_every_method_is_a_config_or_a_refusal(comparison, documents):
    c = comparison if documents else comparison._replace(documents=None)
    found, refused = command.candidates(c, command.names())
    assert {x.name for x in found} | {row["name"] for row in refused} == set(command.names())
    assert {row["name"] for row in refused} == (set() if documents else {"rag", "rag_lora"})
    assert len({x.id for x in found}) == len(found)
    for x in (x for x in found if x.trained):
        schema.resolve(schema.read(inputs.CONFIG), x.setting.train, [], inputs.CONFIG)
        json.dumps(x.row())
    fewer, _ = command.candidates(c, command.names(), 2)
    assert [x.id for x in fewer if x.name == "lora"] == [x.id for x in found if x.name == "lora"][:2]


def test_a_comparison_does_not_continue_with_changed_documents(comparison, tmp_path):
    source = tmp_path / "notes.txt"
    source.write_text("The key is under the mat.")
    c = comparison._replace(documents=str(source))
    index.build(str(source), tmp_path / "index")
    work.check_documents(c)
    source.write_text("The key is in the shed.")
    with pytest.raises(UserError, match="the documents have changed"):
        work.check_documents(c)


def test_a_hosted_model_is_prompted_and_not_trained(comparison):
    name = "openai:https://example.org/v1#large"
    base = inputs.base(name, comparison.task)
    found, refused = command.candidates(comparison._replace(bases={name: base}), command.names())
    assert {x.name for x in found} == {"zero_shot", "instruction", "few_shot", "rag"}
    assert {row["name"] for row in refused} == {"lora", "qlora", "full", "rag_lora"}
    assert all(row["leaves"] for row in refused)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("q", "")] * 40, "not a question with an answer"),
        ([(f"q{i}", f"{i}") for i in range(10)], "too few rows to compare methods"),
        ([(f"q{i}", "yes") for i in range(200)], "every row has the answer 'yes'"),
    ],
)
def test_rows_that_decide_nothing_are_one_line(tmp_path, rows, message):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in rows))
    with pytest.raises(UserError, match=message):
        inputs.read(str(path))


@pytest.mark.parametrize(
    ("error", "raised"), [("OSError(28, 'No space left on device')", UserError), ("ValueError", work.Failed)]
)
def test_a_full_disk_stops_the_comparison_and_blames_no_method(comparison, error, raised):
    stage = Stage("fill", ["timeit", "-n1", "-r1", f"raise {error}"], lambda: 0.0, 1)
    with pytest.raises(raised, match=error.split("'")[1] if "'" in error else error):
        work.do(comparison, "fill", [stage])


# --- whole comparisons ---


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    network, params = random_model(dataclasses.replace(TINY, max_len=512))
    export_hf(network, params, tokenizers.load("bytes"), folder, check=False)
    return folder


def test_a_bundle_asks_as_its_record_says(model, tmp_path):
    context = Context(instruction="Be brief.", shots=1, pick="fixed")
    files.write_lines(tmp_path / bundle.EXAMPLES, [{"prompt": "is 3 odd?", "answer": "yes"}])
    found = {"format": 1, "model": str(model), "adapter": "", "context": context.to_dict(), "seed": 0, "from": {}}
    files.write_json(tmp_path / bundle.NAME, found)
    lm, plain = models.load(tmp_path), models.load(model)
    assert lm.encode("is 4 odd?") == plain.encode("Be brief.\n\nis 3 odd?yes\n\nis 4 odd?")
    with pytest.raises(UserError, match="already contains an adapter"):
        models.load(tmp_path, adapter=model)
    files.write_json(tmp_path / bundle.NAME, found | {"format": 2})
    with pytest.raises(UserError, match="different version"):
        models.load(tmp_path)


def test_plans_and_trainings_for_a_cluster(model, comparison, tmp_path, capsys):
    argv = [f"--task={comparison.task.spec}", f"--models={model}", "--methods=zero_shot,lora", "--rungs=2"]
    assert command.main([*argv, "--plan", "--seeds=2", f"--out={tmp_path / 'plan'}"]) == 0
    printed = capsys.readouterr().out
    assert "LoRA, rank 16" in printed and "seeds of the test: 2" in printed and not (tmp_path / "plan").exists()
    assert command.main([*argv, "--emit=slurm", f"--out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out/runs/emit/sweep.sbatch").read_text()
    assert text.count("exec python -m train.main") == 3 and "lora-lr-0-0003-rung0" in text
    assert text.count("data.holdout=0.0") == 3  # all training rows are trained on
    [path] = (tmp_path / "out/rows").glob("train-*.jsonl")
    third = halving.rungs(2, len(comparison.task.scored["train"]), 20)[0]["train"]
    assert len(rows := files.read_lines(path)) == third and set(rows[0]) == {"prompt", "completion"}
    [decision] = files.load_json(tmp_path / "out" / record.NAME)["decisions"]
    assert decision["kept"] is None and len(decision["entered"]) == 4
    with open(comparison.task.spec, "a") as file:
        file.write("what is 999?,1\n")
    assert command.main([*argv, "--emit=slurm", f"--out={tmp_path / 'out'}"]) == exits.INPUT
    assert "of other rows: the file has changed" in capsys.readouterr().err
    code = command.main([*argv, "--budget=1e3", f"--out={tmp_path / 'small'}"])
    assert code == exits.INPUT and "the budget of 1 kFLOP is too small" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_choices_and_scores(model, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\n" + "".join(f"is {i} odd?,{'yes' if i % 2 else 'no'}\n" for i in range(200)))
    argv = [f"--task={rows}", f"--models={model}", "--methods=zero_shot,lora", "--rungs=1", "--seeds=2", "--epochs=1"]
    began = time.monotonic()
    code, _, err = run(*argv, f"--out={tmp_path / 'whole'}", module="tools.compare")
    assert code == 0, err
    needed, rng = time.monotonic() - began, random.Random(0)
    for _ in range(3):
        process = start(*argv, f"--out={tmp_path / 'killed'}", module="tools.compare")
        time.sleep(rng.uniform(0.1, 0.5) * needed)
        process.send_signal(signal.SIGKILL)
        process.wait()
    code, _, err = run(*argv, f"--out={tmp_path / 'killed'}", module="tools.compare")
    assert code == 0, err
    whole, killed = (files.load_json(tmp_path / name / record.NAME) for name in ("whole", "killed"))
    assert timeless(killed) == json.loads(json.dumps(timeless(whole)).replace("/whole", "/killed"))
    assert [row["status"] for row in whole["methods"]] == ["tested", "tested"]
    assert whole["methods"][1]["candidate"] == whole["decisions"][0]["kept"][1]
    assert [test["seed"] for test in whole["methods"][1]["tests"]] == [0, 1]
    spent = sum(r["flops"] + r["result"]["flops"] for c in whole["candidates"] for r in c["rungs"])
    tests = [test for row in whole["methods"] for test in row["tests"]]
    spent += sum(test["result"]["flops"] + (test["text"] or {"flops": 0})["flops"] for test in tests)
    spent += whole["methods"][1]["tests"][1]["flops"]  # the first seed was trained in the last rung
    assert whole["spent"]["flops"] == pytest.approx(spent)
    assert (tmp_path / "killed/decision.html").exists() and bundle.is_bundle(tmp_path / "killed/bundle")
    lm, best = models.load(tmp_path / "killed/bundle"), files.load_json(tmp_path / "killed/bundle/bundle.json")["from"]
    row = next(row for row in killed["methods"] if row["candidate"] == best["candidate"])
    shown = row["tests"][0]["result"]["samples"][:2]
    _, chosen = choose(lm, [s["prompt"] for s in shown], [("no", "yes")] * 2)
    assert chosen == [s["completion"] for s in shown]
    code, _, err = run(*argv, "--requests=5", f"--out={tmp_path / 'killed'}", module="tools.compare")
    assert code == 0 and files.load_json(tmp_path / "killed" / record.NAME)["requests"] == 5
    code, _, err = run(*argv, "--epochs=2", f"--out={tmp_path / 'killed'}", module="tools.compare")
    assert code == exits.INPUT and "the folder has another comparison, with epochs 1.0" in err


@pytest.mark.slow
def test_a_model_of_this_machine_and_the_same_model_served(tmp_path):
    network, params, _ = make()
    export_hf(network, params, people.tokenizer(), tmp_path / "model", check=False)
    rows, lm = tmp_path / "rows.csv", models.load(tmp_path / "model")
    rows.write_text("question,answer\n" + "".join(f"{i}?,{i % 7}\n" for i in range(100)))
    few = "--rungs=1", "--settings=1", "--seeds=1", "--epochs=1"
    with running(Batcher(lm, rows=4, length=160)) as (port, errors):
        served = f"openai:http://127.0.0.1:{port}/v1#base?in=2&out=10"
        argv = [f"--task={rows}:scorer=exact", f"--models={tmp_path}/model,{served}", "--methods=zero_shot,lora"]
        code, _, err = run(*argv, *few, f"--out={tmp_path}/out", module="tools.compare")
    assert code == 0 and not errors, err
    found = files.load_json(tmp_path / "out" / record.NAME)
    tests = {(m["name"], m["model"] == served): m["tests"] for m in found["methods"] if m["status"] == "tested"}
    assert tests.keys() == {("zero_shot", False), ("zero_shot", True), ("lora", False)}
    here, there = (tests["zero_shot", far][0]["result"] for far in (False, True))
    assert here["scores"] == there["scores"] and here["usd"] is None and there["flops"] is None
    paid = (2 * there["prompt_tokens"] + 10 * there["completion_tokens"]) * there["n"] / 1e6
    assert there["usd"] == pytest.approx(paid)
    [rung] = next(c for c in found["candidates"] if c["model"] == served)["rungs"]
    assert found["spent"]["usd"] == pytest.approx(paid + rung["result"]["usd"])
    assert "the weights of a hosted model are not on this machine" in (tmp_path / "out/decision.html").read_text()


@pytest.mark.slow
def test_passages_are_found_by_words_and_by_vectors(model, tmp_path):
    documents, rows = tmp_path / "documents", tmp_path / "rows.csv"
    documents.mkdir()
    for i in range(30):
        (documents / f"{i}.txt").write_text(f"the rain in spain {i} is {i % 7}")
    rows.write_text("question,answer\n" + "".join(f"the rain in spain {i}?,{i % 7}\n" for i in range(100)))
    made = encoder(tmp_path)
    argv = [f"--task={rows}:scorer=exact", f"--models={model}", f"--documents={documents}", f"--embedder={made}"]
    argv += ["--methods=zero_shot,rag", "--rungs=1", f"--out={tmp_path}/out"]
    code, _, err = run(*argv, module="tools.compare")
    assert code == 0, err
    found = files.load_json(tmp_path / "out" / record.NAME)
    assert [c["id"] for c in found["candidates"]][1:4] == [
        f"rag:passages=1,search={how}" for how in ("mean", "bm25", "dense")
    ]
    assert found["index"]["flops"] > 0 and found["index"]["seconds"] > 0
    mean, words, _ = (c["rungs"][0]["result"]["flops"] for c in found["candidates"][1:4])
    assert mean > words  # a search by vectors embeds the question
    code, _, err = run(*argv[:3], *argv[4:], module="tools.compare")
    assert code == exits.INPUT and "settings for the methods" in err
