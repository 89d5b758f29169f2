"""The feedback page as a person meets it: by keyboard and mouse, in two tabs, wide, narrow, dark, with hostile text."""

import contextlib
from collections.abc import Iterator

import pytest

from examples import scripted_annotator
from feedback import votes
from feedback.items import item
from tests.helpers.browser import NARROW, WIDE, axe, browser
from tests.helpers.feedback import RECORDS, serving

pytestmark = pytest.mark.pages

PAIR, RANK, GOLD = map(item, RECORDS)
GUIDE = "Prefer what is right.\n<b>Not</b> what is long."


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@contextlib.contextmanager
def opened(browser, link: str, **options) -> Iterator:
    """A page at a link, which must not report an error."""
    context = browser.new_context(viewport=WIDE, **options)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(link)
    yield page
    context.close()
    assert not errors


def submit(page, key: str = "Enter") -> None:
    with page.expect_navigation():
        page.keyboard.press(key)


def event(store, asked, name="ann"):
    return store.state.votes[asked.hash][name]


def test_everything_by_keyboard(chromium, tmp_path):
    with serving(tmp_path / "v.db") as (store, people), opened(chromium, people["ann"].link) as page:
        at = votes.shown("ann", PAIR)
        page.keyboard.press("b")
        page.keyboard.press("e")  # corrects the chosen one
        page.locator("textarea:focus").wait_for()
        page.keyboard.press("End")
        page.keyboard.type(", exactly")
        assert page.locator("ins").all_text_contents()
        page.keyboard.press("Escape")
        page.keyboard.press("f")
        page.keyboard.type("a reason; b and x are text here")
        page.keyboard.press("Escape")
        submit(page)
        content = event(store, PAIR).content
        assert content["ranks"] == [1 if answer == at[1] else 2 for answer in range(2)]
        assert content["edits"] == {str(at[1]): PAIR.texts[at[1]] + ", exactly"} and content["ms"] > 0
        assert content["flags"] == {str(at[1]): "a reason; b and x are text here"}
        assert "arithmetic" in page.locator(".strip").text_content()
        submit(page, "u")
        assert page.locator("#task").get_attribute("data-item") == PAIR.hash
        assert page.locator("textarea").nth(1).input_value() == PAIR.texts[at[1]] + ", exactly"
        page.keyboard.press("a")
        submit(page, "a")  # the same again submits
        assert event(store, PAIR).ranks == [1 if answer == at[0] else 2 for answer in range(2)]
        at = votes.shown("ann", RANK)
        for key in ("c", "a", "Shift+b", "v", "5", "1", "3"):
            page.keyboard.press(key)
        assert page.locator("#order").text_content() == "C > A = B"
        submit(page)
        content = event(store, RANK).content
        assert [content["ranks"][i] for i in at] == [2, 2, 1] and [content["ratings"]["true"][i] for i in at] == [
            5,
            1,
            3,
        ]
        page.keyboard.press("x")
        submit(page)
        assert event(store, GOLD).content["choice"] == "bad" and "All done" in page.text_content("main")


def test_everything_by_mouse(chromium, tmp_path):
    with serving(tmp_path / "v.db") as (store, people), opened(chromium, people["ann"].link) as page:
        assert page.locator("#submit").is_disabled()
        page.click("text=Tie")
        with page.expect_navigation():
            page.click("#submit")
        assert event(store, PAIR).ranks == [1, 1]
        page.locator(".answer").nth(1).get_by_label("B is number 2").check(force=True)
        page.keyboard.press("1")  # a digit in the ranks of an answer
        page.click("text=Others worse")
        page.get_by_label("A, true: 4 of 5").check(force=True)
        with page.expect_navigation():
            page.click("#submit")
        at = votes.shown("ann", RANK)
        assert [event(store, RANK).ranks[i] for i in at] == [2, 1, 2]
        with page.expect_navigation():
            page.click("#undo")
        page.click("text=Skip")
        with page.expect_navigation():
            page.click("#submit")
        assert event(store, RANK).content["choice"] == "skip"
        page.click("text=ann")
        with page.expect_navigation():
            page.locator("[data-undo]").last.click()
        assert page.locator("#task").get_attribute("data-item") == PAIR.hash


def test_two_tabs_vote_once_and_drafts_stay(chromium, tmp_path):
    with serving(tmp_path / "v.db") as (store, people), opened(chromium, people["ann"].link) as page:
        other = page.context.new_page()
        other.goto(people["ann"].link)
        other.keyboard.press("a")
        page.keyboard.press("b")
        page.locator("#saved", has_text="Draft saved").wait_for()
        page.reload()
        page.keyboard.press("b")  # a restored choice that is made again is not submitted yet
        assert page.locator("[aria-pressed=true]").text_content().startswith("B better")
        submit(page)
        other.keyboard.press("Enter")
        other.wait_for_selector("#problem:not([hidden])")
        assert "another tab" in other.locator("#problem").text_content() and len(store.events()) == 1


def test_a_server_that_is_away_loses_nothing(chromium, tmp_path):
    with serving(tmp_path / "v.db") as (store, people), opened(chromium, people["ann"].link) as page:
        page.route("**/vote", lambda route: route.abort())
        page.keyboard.press("a")
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem:not([hidden])")
        page.unroute("**/vote")
        submit(page)
        assert len(store.events()) == 1


def test_guidelines_are_shown_once_per_version(chromium, tmp_path):
    with serving(tmp_path / "v.db") as (store, people):
        store.guide("old")
        store.guide(GUIDE)
        with opened(chromium, people["ann"].link) as page:
            assert page.locator("#guide").is_visible() and "<b>Not</b>" in page.locator("#guide").text_content()
            assert axe(page) == []
            page.keyboard.press("Escape")
            page.keyboard.press("t")
            submit(page)
            assert not page.locator("#guide").is_visible() and event(store, PAIR).content["guidelines"] == 2
            page.keyboard.press("g")
            assert page.locator("#guide").is_visible()


LOOKS = [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light"), (NARROW, "dark")]


@pytest.mark.parametrize("size, scheme", LOOKS, ids=lambda x: x if isinstance(x, str) else str(x["width"]))
def test_no_accessibility_errors(chromium, tmp_path, size, scheme):
    records = [*RECORDS, {"prompt": "p " * 3000, "answers": ["a " * 3000, "b", "c", "d" * 3000]}]
    with (
        serving(tmp_path / "v.db", records=records) as (store, people),
        opened(chromium, people["ann"].link, color_scheme=scheme) as page,
    ):
        page.set_viewport_size(size)
        for name in store.items:
            page.goto(f"{people['ann'].link}?item={name}")
            for button in page.locator("[data-do=edit], [data-do=flag]").all():
                button.click()
            page.keyboard.press("Escape")
            assert axe(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
            page.locator("[data-do=tie]").click()
            with page.expect_navigation():
                page.click("#submit")
            people["bob"].post("vote", {"item": name, "version": 0, "choice": "bad"})
        for path in ("", "me"):
            page.goto(people["ann"].link + path)
            assert axe(page) == []
        for path in ("", "people/ann", "settle"):
            page.goto(people["owner"].link + path)
            assert axe(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def test_hostile_texts_neither_run_nor_load_anything(chromium, tmp_path):
    attack = "<script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>\u202e</textarea></script>"
    records = [{"prompt": attack, "answers": [attack, attack + "!"], "judge": {"ranks": [2, 1], "why": attack}}]
    records += [{"prompt": "1 MB", "answers": ["x<\u202e" * 350_000, "word " * 200_000]}]
    with serving(tmp_path / "v.db", records=records) as (store, people), opened(chromium, people["ann"].link) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.keyboard.press("e")
        page.locator("textarea:focus").wait_for()
        page.keyboard.type(attack)
        page.keyboard.press("Escape")
        page.keyboard.press("f")
        page.keyboard.type(attack)
        page.locator("#saved", has_text="Draft saved").wait_for()
        page.reload()
        page.keyboard.press("a")
        submit(page)
        assert attack in event(store, item(records[0])).content["edits"][str(votes.shown("ann", item(records[0]))[0])]
        page.keyboard.press("e")
        page.locator("textarea:focus").wait_for()
        page.keyboard.type("!")
        page.keyboard.press("Escape")
        page.keyboard.press("b")
        submit(page)
        page.goto(people["ann"].link + "me")
        assert len(store.state.of("ann")) == 2 and all(url.startswith("http://127.0.0.1:") for url in asked)


def test_a_scripted_annotator_votes_through_the_page(chromium, tmp_path):
    """Half of its votes are wrong; without noise all are right, ties and rankings among them."""
    lengths = [("a", "bb"), ("a", "b"), ("ccc", "a", "bb", "dd")]
    records = [{"prompt": f"{i}", "answers": [*texts]} for i, texts in enumerate(lengths)]
    records += [{"prompt": f"pair {i}", "answers": ["x", "xx"]} for i in range(12)]
    longest = scripted_annotator.RULES["longest"]
    with serving(tmp_path / "v.db", records=records) as (store, people):
        store.guide(GUIDE)
        with opened(chromium, people["ann"].link) as page:
            assert scripted_annotator.vote(page, longest) == 15
        ranks = [event(store, asked).ranks for asked in store.items.values()]
        assert ranks == [[2, 1], [1, 1], [1, 3, 2, 2], *[[2, 1]] * 12]
        with opened(chromium, people["bob"].link) as page:
            assert scripted_annotator.vote(page, longest, noise=0.5, seed=1, most=15) == 15
        wrong = [event(store, asked, "bob").ranks == [1, 2] for asked in list(store.items.values())[3:]]
        assert 2 <= sum(wrong) <= 10
