"""The pages as a person meets them: opened in a browser, wide and narrow, without accessibility errors."""

import json

import pytest

from tests.helpers import comparison
from tests.helpers.browser import NARROW, WIDE, axe, browser
from tools.compare import page as decision
from tools.report import page as report
from tools.sweep import page as sweep

pytestmark = pytest.mark.pages

GREY = "<html lang=en><title>x</title><main><h1>Title</h1><p style='color:#ccc'>pale</p></main>"


def test_the_rules_find_what_cannot_be_read():
    with browser() as chromium:
        page = chromium.new_page(viewport=WIDE)
        page.set_content(GREY)
        assert [rule.split(":")[0] for rule in axe(page)] == ["color-contrast"]
        page.set_content(GREY.replace("#ccc", "#000"))
        assert axe(page) == []


def training(folder, lr, loss):
    """A finished run of a sweep with two evaluations of a task."""
    held = lambda step, nll: {"step": step, "time": 1e9 + step, "kind": "eval", "nll": nll, "bits_per_byte": nll / 2}
    step = {"step": 10, "time": 1e9, "kind": "train", "loss": loss, "seconds": {"compile": 3.0, "step": 9.0}}
    done = {"step": 20, "time": 2e9, "kind": "event", "event": "done", "flops": 2e12, "tokens": 900, "targets": 90}
    score = comparison.result(0.8) | {"shots": 0, "model": "base", "time": 2e9}
    config = {"init": "base", "steps": 20, "peft": {"name": "lora", "rank": 4}, "optim": {"lr": lr}}
    folder.mkdir(parents=True)
    lines = {"metrics": [held(0, 3.0), step, held(20, loss), done], "evals": [score, score | {"shots": 4}]}
    for name, found in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    point = {"index": 0, "values": {"optim.lr": lr, "model.width": 8}}
    for name, found in (("config", config), ("point", point), ("cost", {"parameters": 1000, "trained": 20})):
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a decision, of runs, and of a sweep."""
    at = tmp_path_factory.mktemp("pages")
    runs = [training(at / "sweep" / f"{lr:g}", lr, 10 * lr) for lr in (0.01, 0.02)]
    made = comparison.record()
    return (
        decision.write(comparison.write(at / "compare", made), made),
        report.write(runs, at / "report.html"),
        sweep.write(at / "sweep", "eval/nll", maximize=False),
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_break_no_rule_and_fit_the_screen(pages, scheme):
    with browser() as chromium:
        for view in (WIDE, NARROW):
            page = chromium.new_page(viewport=view, color_scheme=scheme)
            for path in pages:
                page.goto(path.as_uri())
                page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
                assert axe(page) == [], (path.name, view)
                assert page.evaluate("document.documentElement.scrollWidth") <= view["width"], (path.name, view)


def test_the_slider_moves_the_figures_and_the_page_needs_no_script(pages):
    with browser() as chromium:
        page = chromium.new_page(viewport=NARROW)
        page.goto(pages[0].as_uri())
        before = page.inner_text(".chances table")
        assert page.is_visible("#requests") and "$0.31" in before
        page.fill("#requests", "60")
        after = page.inner_text(".chances table")
        assert page.inner_text("#n") == "100,000,000" and after != before and "$40" in after  # 60 TFLOP at $6.7e-21
        page.click("#quality-against-cost td a")
        assert page.is_visible("#repeat-it pre")  # the link opens the commands of its method
        still = chromium.new_context(java_script_enabled=False).new_page()
        still.goto(pages[0].as_uri())
        assert not still.is_visible("#requests") and "$0.31" in still.inner_text(".chances table")
