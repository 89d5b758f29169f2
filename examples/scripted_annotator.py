"""Simulates an annotator with a known error rate, who votes on the real feedback page in a browser.

    python -m feedback.main --db=votes.db --items=items.jsonl      prints the link
    python -m examples.scripted_annotator LINK [--prefer=longest|shortest|FILE.py] [--noise=0.1] [--seed=0] [--most=100]

FILE.py defines a function `score(prompt, answer)`. The answer with the higher score is preferred, and equal scores are
a tie. For each item, the ranking of the answers is reversed with probability --noise. The script needs playwright and
Chromium, which `make .venv/pages` installs.
"""

import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import cli
from common.errors import UserError

Score = Callable[[str, str], float]
RULES: dict[str, Score] = {
    "longest": lambda prompt, answer: len(answer),
    "shortest": lambda prompt, answer: -len(answer),
}


def annotate(link: str, score: Score, *, chromium: str = "/usr/bin/chromium", **options: Any) -> int:
    """Opens a link to the feedback page in a browser, and votes there. The options are passed to `vote`. Returns the
    number of votes."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        page = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.goto(link)
        return vote(page, score, **options)


def vote(page: Any, score: Score, *, noise: float = 0.0, seed: int = 0, most: int | None = None) -> int:
    """Votes on all items of an open feedback page, or on the first `most` items, by pressing keys as a person would.
    Returns the number of votes."""
    draw, done = random.Random(seed), 0
    while done != most and page.locator("#task").get_attribute("data-item"):
        if page.locator("dialog[open]").count():  # guidelines
            page.keyboard.press("Escape")
        prompt = page.locator(".prompt .text").last.text_content()
        answers = page.locator(".answer > .text").all_text_contents()
        for key in keys([score(prompt, answer) for answer in answers], draw.random() < noise):
            page.keyboard.press(key)
        with page.expect_navigation():
            page.keyboard.press("Enter")
        done += 1
    return done


def keys(scores: list[float], wrong: bool) -> list[str]:
    """The keys to press to rank the answers. Two answers need only the letter of the better one, and a tie of all
    answers is "t". For any other ranking, press the letters of the answers from best to worst, and hold Shift for an
    answer that ties with the previous one."""
    if len(set(scores)) == 1:
        return ["t"]
    order = sorted(range(len(scores)), key=lambda i: scores[i], reverse=not wrong)
    if len(order) == 2:
        return ["ab"[order[0]]]
    tied = [k > 0 and scores[order[k]] == scores[order[k - 1]] for k in range(len(order))]
    return ["Shift+" * same + "abcd"[i] for i, same in zip(order, tied)]


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("examples.scripted_annotator", __doc__)
    parser.add_argument("link")
    parser.add_argument("--prefer", default="longest")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=cli.count, default=None, help="maximum number of items to vote on; default: all")
    args = parser.parse_args(argv)
    if args.prefer not in RULES and not Path(args.prefer).is_file():
        raise UserError(f"neither a rule nor a file: {args.prefer!r}", "--prefer", f"{', '.join(RULES)} or FILE.py")
    score = RULES.get(args.prefer) or runpy.run_path(args.prefer)["score"]
    done = annotate(args.link, score, noise=args.noise, seed=args.seed, most=args.most)
    print(f"{done:,} votes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
