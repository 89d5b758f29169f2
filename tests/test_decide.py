"""The decision of a comparison: probabilities, costs and break-even worked by hand, and its page."""

import json
import math

import numpy as np
import pytest

from common import chips
from common.errors import UserError
from tests.helpers import comparison
from tests.helpers.pages import EVIL, Page
from tools.compare import decide, page, page_learning, page_parts, page_text
from tools.compare.decide import Inputs, Price

DOLLAR = {"name": "box", "kind": "given", "usd_hour": [1.0, 1.0, 1.0], "seconds_per_flop": 3600.0}  # $1 per FLOP


def scored(name, scores, request=1.0, training=0.0, **more):
    """A method whose tests have these scores [seeds][rows]; costs in FLOPs, which are dollars."""
    m = comparison.method(name, name, [0.5] * len(scores), **more)
    for test, found in zip(m["tests"], scores, strict=True):
        rows = [f"{i}" for i in range(len(found))]
        test |= {"flops": training, "result": test["result"] | {"rows": rows, "scores": found, "n": len(found)}}
    return m | {"request": m["request"] | {"flops": request}}


def of(*methods, **changes):
    return comparison.record(methods=list(methods), prices=[DOLLAR], documents=None, index=None) | changes


def test_probability_of_a_tiny_case_by_hand():
    """Of two rows the dear one gets one right, the cheap one none. Both draws are the wrong row with probability 1/4:
    then the cheap one is within the margin."""
    d = decide.decide(of(scored("dear", [[1, 0]], 2.0), scored("cheap", [[0, 0]], 1.0)), Inputs(1.0, margin=0.25))
    assert d.best.name == "dear" and d.probability == pytest.approx([0.75, 0.25], abs=0.015)
    share, score, cost = d.lost
    assert share == pytest.approx(0.25, abs=0.015) and (score, cost) == (0, 1)  # it pays $1 for nothing
    assert not d.enough and d.rows_needed == decide.LEAST


def test_probability_over_the_price_range_by_hand():
    """Equally good; a hosted model at $2, and one's own machine at $1 to $3, most likely $2."""
    hosted = scored("hosted", [[1, 1]], None, leaves=True)
    hosted["request"]["usd"] = 2.0
    record = of(scored("own", [[1, 1]]), hosted, prices=[DOLLAR | {"usd_hour": [1.0, 2.0, 3.0]}])
    assert decide.decide(record, Inputs(1.0)).probability == pytest.approx([0.5, 0.5], abs=0.015)
    cheaper = decide.decide(record, Inputs(1.0, price=0.75))  # P(0.75 t < 2) for a triangular t = 1 - (3 - 8/3)² / 2
    assert cheaper.best.name == "own" and cheaper.probability[0] == pytest.approx(1 - 1 / 18, abs=0.01)


def test_seeds_widen_the_draws_without_bias():
    """Two seeds with means 0 and 1: the variance of their mean is s² / 2 = 0.25."""
    [found] = decide.options(of(scored("lora", [[0.0] * 50, [1.0] * 50], trained=True)))
    drawn = decide.drawn_scores([found])
    assert drawn.mean() == pytest.approx(0.5, abs=0.02) and drawn.var() == pytest.approx(0.25, abs=0.01)


def test_the_best_is_the_cheapest_within_the_margin():
    scores, costs = [[0.9, 0.89, 0.5]], [[3.0, 2.0, 1.0]]
    best = lambda margin, costs=costs: int(decide.winners(np.array(scores), np.array(costs), margin)[0])
    assert [best(0.0), best(0.02), best(0.5)] == [0, 1, 2]
    assert best(0.5, [[1.0, 1.0, 1.0]]) == 0  # equally cheap
    assert best(0.0, [[math.inf, 0, 0]]) == 0 and best(0.02, [[math.inf, math.inf, 0]]) == 0  # unknown prices


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((10, 1), (0, 3), (5, "b then a")),  # (cost A trained - cost B trained) / (request B - request A)
        ((0, 3), (10, 1), (5, "a then b")),
        ((0, 1), (10, 3), (None, "a")),
        ((10, 3), (0, 1), (None, "b")),
        ((0, 1), (0, 3), (None, "a")),
        ((10, 1), (0, 1), (None, "b")),
        ((1, 1), (1, 1), (None, "equal")),
    ],
)
def test_break_even_in_all_cases_of_signs(a, b, expected):
    assert decide.break_even(a, b) == expected


def test_the_number_of_requests_at_which_it_changes():
    """Training for $120 a year and $1 a request, against $3 a request: $10 + n = 3 n at n = 5."""
    right = [[1.0] * 40]
    record = of(scored("tuned", right, 1.0, 120.0, trained=True), scored("prompt", right, 3.0))
    d = decide.decide(record, Inputs(20.0))
    assert d.best.name == "tuned" and d.enough and d.lost == (0, 0, 0)
    flips = {flip.fact: flip for flip in d.flips}
    assert flips["requests"].value == pytest.approx(5, rel=0.02) and d.options[flips["requests"].to].name == "prompt"
    assert flips["labels"].value == pytest.approx(3, rel=0.02)  # $40 a month
    assert list(page_parts.break_even(d)) == ["tuned is cheaper than prompt from 5 requests per month."]
    assert decide.decide(record, Inputs(4.0)).best.name == "prompt"


def test_upkeep_by_hand():
    """Labels change every 12 months, documents every 2; a training costs $6 and $18 of work, the index $1."""
    more = {"documents": "wiki", "index": {"chunks": 1, "bytes": 1, "flops": 1.0, "seconds": 1}}
    right, given = [[1.0] * 40], Inputs(10.0, labels=12, documents=2, people=18, idle=5)
    rag = scored("rag", right)
    tuned = scored("tuned", right, training=6.0, trained=True)
    reader = scored("rag_lora", right, training=6.0, trained=True)
    found = decide.options(of(rag, tuned, reader, **more))
    costs = decide.cost(found, Price("$", (1, 1, 1), 1.0), given, [[1.0]], True)[0]
    assert list(costs) == [10 + 5 + 1 / 2, 10 + 5 + 24 / 2, 10 + 5 + 24 / 12 + 1 / 2]  # tuned learned the documents


def test_costs_without_a_price():
    hosted = scored("hosted", [[1.0] * 40], None, leaves=True)
    hosted["request"]["usd"] = 2.0
    record = of(scored("own", [[1.0] * 40], 3600.0), hosted, prices=[DOLLAR | {"usd_hour": None}])
    d = decide.decide(record, Inputs(2.0))
    assert (d.price.unit, d.best.name, list(d.cost[1])) == ("h", "own", [7200, math.inf])
    assert page_text.money(d.price, 7200) == "7,200 machine hours" and page_text.money(d.price, math.inf) == "n/a"
    assert page_text.money(d.price, 1) == "1 machine hour"
    alone = decide.decide(of(hosted, prices=[DOLLAR | {"usd_hour": None}]), Inputs(2.0))
    assert (alone.price.unit, list(alone.cost[1]), list(alone.probability)) == ("$", [4.0], [1.0])
    unknown = decide.decide(record | {"prices": [DOLLAR | {"usd_hour": None, "seconds_per_flop": None}]}, Inputs(2.0))
    assert unknown.price.unit == "FLOP"


def test_more_rows_make_sure():
    """7 points apart, on other rows: the draws are too wide to say whether the cheap one is good enough."""
    dear, cheap = [[1.0] * 40 + [0.0] * 20], [[0.0] * 24 + [1.0] * 36]
    d = decide.decide(of(scored("dear", dear, 2.0), scored("cheap", cheap)), Inputs(1.0))
    assert not d.enough and 60 < d.rows_needed < 2000
    told = page_text.answer(d, of())
    assert told.title == f"Not enough test rows to decide: {d.best.label} or {d.options[1].label}"
    assert f"about {d.rows_needed:,} would be needed" in told.reasons


def test_nothing_that_works_is_not_recommended():
    d = decide.decide(of(scored("a", [[0.0] * 40]), scored("b", [[0.0] * 40])), Inputs(1.0))
    assert page_text.answer(d, of()).title == "No method works"


def test_ten_times_the_rows_by_hand():
    """Log odds 0 at 10 rows and log 3 at 100: log 9 at 1,000, which is 0.9."""
    point = lambda rows, mean: {"method": "lora", "rows": rows, "mean": mean, "low": mean - 0.05, "high": mean + 0.05}
    found = page_learning.extrapolate([point(100, 0.75), point(10, 0.5)])
    assert (found.rows, found.last["rows"]) == (1000, 100) and found.mean == pytest.approx(0.9)
    assert 0.75 < found.low < 0.9 < found.high < 1
    assert page_learning.extrapolate([point(10, 0.5)]) is None and page_learning.extrapolate([]) is None


def test_results_on_other_rows_are_refused():
    with pytest.raises(UserError, match="not on the same test rows"):
        decide.options(of(scored("a", [[1, 0]]), scored("b", [[1]])))
    with pytest.raises(UserError, match="no method has test results"):
        decide.decide(of(), Inputs(1.0))


# --- the page ---


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = comparison.write(tmp_path_factory.mktemp("compared"), comparison.record())
    page.write(out, comparison.record())
    return out


def test_page_is_whole_and_static(made):
    text = (made / "decision.html").read_text("utf-8")
    read = Page(text)
    addresses = [a for a in read.addresses if not a.startswith("#")]
    assert addresses and all(a.startswith("runs/") and (made / a).parent.is_dir() for a in addresses)
    assert EVIL in read.text and "@import" not in text and "url(" not in text and text.count("<script>") == 1
    anchors = {a[1:] for a in read.addresses if a.startswith("#")}
    assert all(f'id="{a}"' in text for a in anchors)
    assert len(text) < 200_000


def test_page_says_what_it_knows(made):
    told = " ".join(Page((made / "decision.html").read_text("utf-8")).text.replace("\u00a0", " ").split())
    for text in (
        "Not enough test rows to decide: full fine-tuning or LoRA, rank 16", "2 points", "planned", "measured", "given",
        "1.47 times as fast", "about 1.3", "clearly worse", "December", "data leaves", "$2.00",
        "extrapolation", "python -m evals.main --model=runs/lora-0 --tasks=dates", "v5e at $1.20 per hour",
    ):  # fmt: skip
        assert text in told, text


def test_the_gas_of_a_comparison_by_hand():
    """3.6e18 FLOPs in two hours on four v5e."""
    machine = {"name": "TPU v5 lite", "devices": 4, "chip": "v5e"}
    record = comparison.record(machine=machine, spent={"flops": 3.6e18, "seconds": 7200.0})
    chip, site = chips.find("v5e"), chips.site()
    line, left, _ = page_parts.spent(record)
    kwh = 8 * chip.watts.value / 1000 * site.pue.value
    assert "3.6e18 model FLOPs" in line and "8 v5e chip-h" in line
    assert f"MFU {100 * 3.6e18 / (8 * 3600 * chip.tflops.value * 1e12):.0f} %" in line
    assert f"${8 * chip.usd_hour.value:.1f} on demand" in line and f"{kwh:.2g} kWh" in line
    assert "30 min or 300 PFLOP, 268 PFLOP were not spent" in left


def test_short_forms_and_other_facts(made, capsys):
    told = json.loads((made / "decision.json").read_text())
    assert told["method"] == "full" and told["methods"]["full"]["probability"] > 0.5
    assert told["flips"][0]["fact"] == "rows" and told["flips"][0]["to"] == "lora"
    short = (made / "decision.md").read_text("utf-8")
    assert "# Not enough test rows to decide" in short and "| LoRA, rank 16 | 90 %" in short
    assert page.main([str(made), "--margin=5", "--requests=2000", "--people=900", "--credit=Texts: CC BY 4.0"]) == 0
    assert "decision.html" in capsys.readouterr().out
    assert "Texts: CC BY 4.0" in (made / "decision.html").read_text("utf-8")
    told = json.loads((made / "decision.json").read_text())
    assert told["method"] == "lora" and told["given"]["margin"] == 0.05 and told["given"]["people"] == 900


@pytest.mark.parametrize(
    "option, problem",
    [
        ("--margin=x", "amount value: 'x'"),
        ("--idle=-1", "at least 0"),
        ("--labels=0", "more than 0 months"),
        ("--idle=1", "comparison.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, option, problem):
    assert page.main([str(tmp_path), option]) == 2
    assert problem in capsys.readouterr().err
