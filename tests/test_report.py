import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common import exits, jobs, numbers
from common.errors import UserError
from tests.helpers.pages import EVIL, Page
from tools import demo
from tools.report import __main__ as door
from tools.report import data as report_data
from tools.report import page as report
from tools.report import svg
from tools.report import text as report_text

BASE_LOSS = {"text": "pydocs", "n": 12, "tokens": 1000, "model": "base", "loss": 2.5, "time": 9.0}


def result(mean, low, high, shots=0, prompt_tokens=50, **more):
    answer = lambda c: {"prompt": f"q {EVIL}", "answer": "fig", "completion": c, "score": float(c == "fig")}
    return {
        "task": "fruit", "mean": mean, "n": 50, "shots": shots, "seed": 0, "score": mean * 50, "low": low, "high": high,
        "prompt_tokens": prompt_tokens, "completion_tokens": 3.0, "seconds": 4.0, "flops": 50e9 * prompt_tokens,
        "samples": [answer("fig" if mean > 0.5 else EVIL)], "time": 9.0, "model": "base",
    } | more  # fmt: skip


def write(folder, metrics=(), evals=(), **files):
    folder.mkdir(parents=True)
    for name, lines in (("metrics", metrics), ("evals", evals)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Prompting without a run, a finished run with LoRA, and a run that was killed in its tenth step."""
    config = {"init": "base", "steps": 20, "peft": {"name": "lora", "rank": 4}, "optim": {"lr": 0.001}}
    step = lambda i, loss, spent: {
        "step": i, "time": 1e9 + i, "kind": "train", "loss": loss,
        "seconds": {"init": 5.0, "compile": 3.0, "step": spent},
    }  # fmt: skip
    held = lambda i, nll: {"step": i, "time": 1e9 + i, "kind": "eval", "nll": nll, "bits_per_byte": nll / 2}
    done = {
        "step": 20, "time": 1e9 + 21, "kind": "event", "event": "done", "tokens": 9000, "targets": 800, "flops": 2e12,
        "tokens_per_second": 210.0, "peak_rss_bytes": 2_000_000_000,
    }  # fmt: skip
    lora = write(
        tmp_path / "lora",
        [held(0, 3.0), step(10, 1.0, 10.0), step(20, 0.5, 20.0), held(20, 0.25), done],
        [BASE_LOSS | {"loss": 2.625}, result(0.2, 0.1, 0.3), result(0.9, 0.786, 0.957, time=1e9 + 30)],
        config=config,
        cost={"parameters": 1_000_000, "trained": 2000},
        environment={"python": "3.11", "devices": {"kind": "cpu", "count": 1}},
    )
    leaf = {"dtype": "float32", "shape": [2, 100], "hash": ""}
    leaves = {"params/policy/a": leaf, "params/policy/b": leaf | {"dtype": "bfloat16"}, "opt_state/mu": leaf}
    write(lora / "ckpt" / "20", state_hashes={"manifest": {"leaves": leaves}})
    killed = write(
        tmp_path / "killed", [held(0, 3.0), step(10, 2.0, 9.0)], config=config | {"peft": {"name": ""}, "steps": 30}
    )
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "ki')
    few = result(0.4, 0.276, 0.538, shots=4, prompt_tokens=200)
    return [write(tmp_path / "prompting", evals=[result(0.04, 0.01, 0.13), few, BASE_LOSS]), lora, killed]


def test_page_is_whole_static_and_escaped(runs, tmp_path):
    page = Page(report.write(runs, tmp_path / "r.html").read_text("utf-8"))
    assert {"svg", "table", "style", "meta"} <= page.tags
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert EVIL in page.text  # as text
    assert "@import" not in page.text and "url(" not in page.text


def test_page_has_the_numbers_with_units_and_admits_the_unknown(runs, tmp_path):
    text = Page(report.write(runs, tmp_path / "r.html").read_text("utf-8")).text
    for told in ("90 %", "79–96 %, n = 50", "2 TFLOP", "2 GB", "1.2 kB", "23 s", "+0.125", "lora", "LoRA r=4", "210"):
        assert told in text, told
    assert "n/a" in text and "10 so far" in text and "peft.rank" in text


def test_sentences_come_from_the_numbers(runs):
    rows = report_data.choices([report_data.read(r) for r in runs])["fruit"]
    told = " ".join(report_text.sentences(rows))
    assert "zero-shot gets 4.0 %, 4-shot gets 40 % and LoRA r=4 gets 90 % right" in told
    assert "50 percentage points above the best prompt" in told
    assert "200 + 3 tokens with 4-shot and 50 + 3 tokens with LoRA r=4" in told
    assert "repaid its training after 13 answers" in told  # 2e12 / (200e9 - 50e9)
    assert "+0.125 nats per token for LoRA r=4" in told


def test_a_score_of_an_earlier_step_says_so(runs):
    old = report_data.read(runs[1])._replace(evals=[result(0.9, 0.8, 0.95, step=10)])
    (choice,) = report_data.choices([old])["fruit"]
    assert (choice.label, choice.flops, choice.seconds) == ("LoRA r=4, at step 10 of 20", None, None)


def test_two_scorings_of_a_task_stand_apart(runs):
    prompting, lora = report_data.read(runs[0]), report_data.read(runs[1])
    assert list(report_data.choices([prompting, lora])) == ["fruit"]
    rescored = lora._replace(evals=[line | {"task_hash": "abc"} for line in lora.evals if "task" in line])
    tasks = report_data.choices([prompting, rescored])
    assert list(tasks) == ["fruit, scored as an earlier version did", "fruit, scored as abc"]
    assert [c.label for c in tasks["fruit, scored as abc"]] == ["LoRA r=4"]


def test_overlapping_intervals_claim_no_gain(runs):
    rows = report_data.choices([report_data.read(r) for r in runs])["fruit"]
    weak = [r._replace(result=r.result | {"mean": 0.45, "low": 0.3, "high": 0.6}) if r.run.config else r for r in rows]
    told = " ".join(report_text.sentences(weak))
    assert "LoRA r=4 shows no significant gain over 4-shot: their intervals overlap." in told


def test_results_on_the_same_rows_are_compared_row_by_row(runs):
    """With slices and answers, in tables of their own; a collapse shows."""
    rows = report_data.choices([report_data.read(r) for r in runs[:2]])["fruit"]
    kept = {"rows": [f"{i}" for i in range(50)], "task_hash": "abc"}
    right = lambda c: [float(i < 50 * c.result["mean"]) for i in range(50)]
    part = {"kind=ripe": {"n": 9, "mean": 0.5, "low": 0.2, "high": 0.8}}
    more = lambda c: {"scores": right(c), "slices": part, "answers": [["fig", 45], ["", 5]]} if c.run.config else {}
    marked = [c._replace(result=c.result | kept | {"scores": right(c)} | more(c)) for c in rows]
    told = " ".join(report_text.sentences(marked))
    assert "(row by row, 95 % interval +" in told and "McNemar's exact test)." in told
    (first, slices), (second, answers) = report.details([(c.label, c.result) for c in marked])
    assert (first, second) == ("By slice", "Most frequent answers")
    assert [cells[0].value for _, cells in slices.rows] == ["n/a", "n/a", "50 %"]
    assert [c.below for c in answers.rows[-1][1]] == ["90 %", "10 %"] and "(empty)" in answers.rows[-1][1][1].value


def test_costs_are_read_from_the_folder(runs):
    lora = report_data.read(runs[1])
    assert report_data.stored(lora.path) == 200 * 4 + 200 * 2
    assert report_data.seconds(lora) == 23.0  # compile and steps of the last line
    session = {"step": 5, "time": 1.0, "kind": "event", "event": "session", "seconds": {"compile": 2.0, "step": 7.0}}
    assert report_data.seconds(lora._replace(metrics=[session, *lora.metrics])) == 32.0
    assert [c.result["mean"] for c in report_data.choices([lora])["fruit"]] == [0.9]  # the newest


@pytest.mark.parametrize(
    ("told", "keys"),
    [
        ("prompting", {}),
        ("full fine-tuning", {"init": "base", "peft": {"name": ""}, "trainable": "all"}),
        ("from scratch", {"init": "", "objective": {"name": "sft"}}),
        ("LoRA on nf4 r=4", {"init": "base", "peft": {"name": "lora", "rank": 4}, "quant": {"name": "nf4"}}),
        ("dpo with full fine-tuning", {"init": "base", "objective": {"name": "dpo", "beta": 0.1}}),
        ("dpo with prefix", {"init": "base", "peft": {"name": "prefix"}, "objective": {"name": "dpo"}}),
        ("full fine-tuning (qat)", {"init": "base", "quant": {"name": "qat"}}),
        ("fine-tuning of layers/attn/.*", {"init": "base", "trainable": "layers/attn/.*"}),
    ],
)
def test_a_run_is_called_what_it_did(told, keys):
    assert report_data.of_run(report_data.Run(None, keys, {}, {}, [], [])) == told


def test_forgetting_is_unknown_on_other_passages(runs):
    prompting, lora = report_data.read(runs[0]), report_data.read(runs[1])
    assert report_data.forgetting(lora, [prompting, lora]) == (0.125, "pydocs")
    other = prompting._replace(evals=[BASE_LOSS | {"tokens": 999}])
    assert report_data.forgetting(lora, [other, lora]) == (None, "")


def test_short_form(runs, tmp_path):
    short = report.write(runs, tmp_path / "r.html").with_suffix(".md").read_text("utf-8")
    assert "| LoRA r=4 | 90 % 79–96 %, n = 50 | 2 TFLOP |" in short


def test_falling_log_probabilities_are_plotted_and_explained(tmp_path):
    pair = {"reward_chosen": 0.1, "reward_rejected": -0.1, "accuracy": 0.7, "kl_per_token": 0.01}
    for name, more in (("dpo", {"logp_chosen": -20.0, "logp_rejected": -30.0}), ("reward", {})):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "kind": "eval", "time": 1.0, "loss": 0.6, **pair, **more} for i in (0, 10)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = dict(report_data.preferences(report_data.read(tmp_path / "dpo")))
    assert found["reward"] == [("reward_chosen", [(0, 0.1), (10, 0.1)]), ("reward_rejected", [(0, -0.1), (10, -0.1)])]
    assert len(found) == 4  # without lengths
    both = report.html([report_data.read(tmp_path / "dpo"), report_data.read(tmp_path / "reward")])
    assert "Preferences: dpo" in both and "Preferences: reward" in both
    assert both.count("chosen answer often falls") == 1 and "logp_rejected" in both


def test_bad_folders_are_told(tmp_path, capsys):
    assert door.main([str(tmp_path / "none")]) == 2 and "no such folder" in capsys.readouterr().err
    assert door.main([str(tmp_path)]) == 2 and "neither metrics.jsonl nor evals.jsonl" in capsys.readouterr().err
    with pytest.raises(UserError, match="no run folders"):
        report.write([], tmp_path / "r.html")


SIMULATED = {  # linear RGB as seen without one kind of cone: Machado et al. 2009, severity 1
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


@pytest.mark.parametrize("vision", SIMULATED)
def test_colors_of_charts_differ_for_every_eye(vision):
    """At least 10 apart in CIELAB, and with a contrast of 3 to the paper, in both schemes."""
    css = (Path(report.__file__).parent / "page.css").read_text()
    for scheme in re.findall(r":root \{(.*?)\}", css, re.S)[:2]:
        hexes = [re.search(r"--paper: #(\w+)", scheme)[1], *re.findall(r"--s\d: #(\w+)", scheme)]
        rgb = np.array([[int(h[i : i + 2], 16) / 255 for i in (0, 2, 4)] for h in hexes])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        xyz = (linear @ np.array(SIMULATED[vision]).T).clip(0, 1) @ np.array(XYZ).T / [0.95047, 1, 1.08883]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        apart = np.linalg.norm(lab[1:, None] - lab[None, 1:], axis=-1) + 99 * np.eye(len(hexes) - 1)
        light = linear @ XYZ[1]
        assert apart.min() > 10
        assert ((np.maximum(light[1:], light[0]) + 0.05) / (np.minimum(light[1:], light[0]) + 0.05)).min() > 3


def test_ticks_enclose_the_values():
    assert svg.ticks(0, 9) == [0, 2, 4, 6, 8, 10]
    assert svg.ticks(0.0, 0.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.decades(0.003, 1.2) == [0.001, 0.01, 0.1, 1.0, 10.0]


@pytest.mark.parametrize(
    "shown, value",
    [("1.2 MB", 1_234_567), ("538 MB", 538_060_032), ("999 B", 999), ("1.0 kB", 999.6), ("0 B", 0), ("n/a", None)],
)
def test_sizes(shown, value):
    assert numbers.size(value) == shown


# --- the demo's stages ---


def stage(folder, name, code):
    """A stage that is done when its file exists. `code` runs as python -m NAME in `folder`."""
    (folder / f"{name}.py").write_text(f"from pathlib import Path\n{code}\n")
    return jobs.Stage(name, [name], lambda: float((folder / f"{name}.txt").exists()), 1)


def test_a_failed_stage_stops_the_demo_and_a_rerun_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    count = "p = Path('{0}.txt'); q = Path('{0}.n'); q.write_text(q.read_text() + 'x' if q.exists() else 'x'); "
    first = stage(tmp_path, "first", count.format("first") + "p.write_text('')")
    second = stage(tmp_path, "second", "print('out of luck'); raise SystemExit(3)")
    third = stage(tmp_path, "third", "Path('third.txt').write_text('')")
    assert jobs.run([first, second, third], tmp_path) == 3
    told = capsys.readouterr().err
    assert "out of luck" in told and "python -m second" in told and not (tmp_path / "third.txt").exists()
    stage(tmp_path, "second", "Path('second.txt').write_text('')")
    assert jobs.run([first, second, third], tmp_path) == 0
    assert (tmp_path / "first.n").read_text() == "x" and (tmp_path / "third.txt").exists()


def test_an_interrupt_reaches_the_stage_once_and_is_told(tmp_path):
    code = "import signal, sys, time\nsave = lambda *_: (Path('saved.txt').write_text(''), sys.exit(75))\n"
    code += "signal.signal(signal.SIGTERM, save)\nPath('up.txt').write_text('')\ntime.sleep(60)"
    stage(tmp_path, "long", code)
    run = "from pathlib import Path; from common import jobs; import sys;"
    run += "sys.exit(jobs.run([jobs.Stage('long', ['long'], lambda: 0.0, 1)], Path('.')))"
    root = str(demo.__file__).rsplit("/tools/", 1)[0]
    child = subprocess.Popen(
        [sys.executable, "-c", run], cwd=tmp_path, env={"PYTHONPATH": f"{root}:{tmp_path}"}, stderr=subprocess.PIPE
    )
    for _ in range(300):
        if (tmp_path / "up.txt").exists():
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    assert b"run the same command" in child.communicate(timeout=30)[1]
    assert child.returncode == exits.PREEMPTED and (tmp_path / "saved.txt").exists()


def test_stages_know_what_is_done(tmp_path):
    at = lambda *states: (tmp_path / "comparison.json").write_text(
        json.dumps({"methods": [{"status": s} for s in states]})
    )
    assert demo.compared(tmp_path) == 0
    at("tested", "refused", "open", "open")
    assert demo.compared(tmp_path) == pytest.approx(0.495)
    at("tested", "refused")
    assert demo.compared(tmp_path) == 0.99  # the page is missing
    (tmp_path / "decision.html").touch()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").touch()
    assert demo.compared(tmp_path) == 1


def test_the_demo_uses_commands_of_the_repository(tmp_path):
    stages = [stage for task in demo.COMPARED for stage in demo.stages(tmp_path, task)]
    assert {s.argv[0] for s in stages} == {"examples.tasks", "tools.compare", "tools.compare.page"}
    assert sum(s.seconds for s in stages) <= 600
