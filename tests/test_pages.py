"""The pages as a person meets them: opened in a browser, wide and narrow, without accessibility errors."""

import pytest

from tests.helpers.browser import WIDE, axe, browser

pytestmark = pytest.mark.pages

GREY = "<html lang=en><title>x</title><main><h1>Title</h1><p style='color:#ccc'>pale</p></main>"


def test_the_rules_find_what_cannot_be_read():
    with browser() as chromium:
        page = chromium.new_page(viewport=WIDE)
        page.set_content(GREY)
        assert [rule.split(":")[0] for rule in axe(page)] == ["color-contrast"]
        page.set_content(GREY.replace("#ccc", "#000"))
        assert axe(page) == []
