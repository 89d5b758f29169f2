"""Makes training rows from people's current decisions, that is, without those that were undone, erased or replaced."""

import itertools
import re
from collections.abc import Iterable, Iterator

from common.types import Json
from feedback.fold import Event, State, relation
from feedback.items import Item, dense

Rows = dict[str, list[Json]]


def rows(items: Iterable[Item], state: State, each: bool = False) -> Rows:
    """Returns {file name: rows}. The votes on an item are combined into one ranking (see `consensus`); if `each` is
    true, every vote becomes a ranking of its own. If the owner has resolved a disagreement, the resolution replaces all
    votes. No rows are made from gold items, which only test annotators, or from skipped items."""
    out: Rows = {}
    for item in items:
        events = decisions(item, state)
        if not events or item.gold:
            continue
        for ranks in [event.ranks for event in events] if each else [consensus(item, events)]:
            if ranks is not None:
                _ranked(out, item, ranks)
        for text in item.texts * (bad(events) if each else mostly_bad(events)):
            _add(out, "kto", _row(item, text) | {"label": False})
        _rated(out, item, events, each)
        _corrected(out, item, events)
    return out


def decisions(item: Item, state: State) -> list[Event]:
    """Returns the owner's resolution of an item or, if there is none, all votes on the item, oldest first. Votes that
    skip the item are left out."""
    found = state.resolved.get(item.hash)
    events = [found] if found else sorted(state.votes.get(item.hash, {}).values(), key=lambda event: event.id)
    return [event for event in events if event.content["choice"] != "skip"]


def consensus(item: Item, events: list[Event]) -> list[int | None] | None:
    """Ranks the answers by the number of comparisons that they won minus the number that they lost, over all votes
    (similar to the methods of Copeland and Borda). With two answers, this is the majority vote. Returns None if no
    answers were compared, or if most people said that all answers are bad."""
    count = len(item.texts)
    if mostly_bad(events):
        return None
    score, judged = [0] * count, [False] * count
    for event, (i, j) in itertools.product(events, itertools.combinations(range(count), 2)):
        side = relation(event.ranks, i, j)
        if side is not None:
            score[i], score[j] = score[i] + side, score[j] - side
            judged[i] = judged[j] = True
    return dense([-s if known else None for s, known in zip(score, judged)]) if any(judged) else None


def bad(events: list[Event]) -> int:
    return sum(event.content["choice"] == "bad" for event in events)


def mostly_bad(events: list[Event]) -> bool:
    return 2 * bad(events) > len(events)


def known(name: str) -> bool:
    """Returns whether `name` is the name of a file that an export may have written."""
    names = "preference|preference_ties|rankings_[2-4]|kto|ratings_.*|corrections|sft|sft_corrections|flags"
    return re.fullmatch(names, name) is not None


def _add(out: Rows, name: str, row: Json) -> None:
    found = out.setdefault(name, [])
    found.append(row)


def _row(item: Item, text: str, column: str = "completion") -> Json:
    return {"prompt": item.content["prompt"], column: item.answered(text)}


def _pair(item: Item, chosen: str, rejected: str) -> Json:
    return _row(item, chosen, "chosen") | {"rejected": item.answered(rejected)}


def _ranked(out: Rows, item: Item, ranks: list[int | None]) -> None:
    """Adds the rows that follow from a ranking: the ranking itself, preference pairs, KTO labels for the best and the
    worst answers and, if only one answer is best, an SFT row. Rankings of two, three and four answers are written to
    separate files, because all rows of a data set must have the same number of answers."""
    known = [(text, rank) for text, rank in zip(item.texts, ranks) if rank is not None]
    texts, places = [text for text, _ in known], dense([rank for _, rank in known])
    answers = [item.answered(text) for text in texts]
    if len(set(places)) > 1:
        _add(out, f"rankings_{len(known)}", {"prompt": item.content["prompt"], "answers": answers, "ranks": places})
    for (a, p), (b, q) in itertools.combinations(zip(texts, places), 2):
        better, worse = (a, b) if p <= q else (b, a)
        if a != b:
            _add(out, "preference_ties", _pair(item, better, worse) | {"tie": int(p == q)})
            if p != q:
                _add(out, "preference", _pair(item, better, worse))
    if len(set(places)) > 1:
        for text, place in zip(texts, places):
            if place in (1, max(places)):
                _add(out, "kto", _row(item, text) | {"label": place == 1})
        if places.count(1) == 1:
            _add(out, "sft", _row(item, texts[places.index(1)]))


def _rated(out: Rows, item: Item, events: list[Event], each: bool) -> None:
    for aspect, (i, text) in itertools.product(item.aspects, enumerate(item.texts)):
        given = [event.content["ratings"].get(aspect) for event in events]
        values = [ratings[i] for ratings in given if ratings and ratings[i] is not None]
        if values and not each:
            values = [sum(values) / len(values)]
        for value in values:
            _add(out, f"ratings_{slug(aspect)}", _row(item, text) | {"rating": value})


def _corrected(out: Rows, item: Item, events: list[Event]) -> None:
    for event in events:
        for i, text in event.content["edits"].items():
            if text.strip():
                _add(out, "corrections", _pair(item, text, item.texts[int(i)]))
                _add(out, "sft_corrections", _row(item, text))


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_") or "rating"


def flags(items: Iterable[Item], state: State) -> Iterator[Json]:
    for item in items:
        for event in state.votes.get(item.hash, {}).values():
            for i, reason in event.content["flags"].items():
                yield _row(item, item.texts[int(i)]) | {"reason": reason, "annotator": event.annotator}
