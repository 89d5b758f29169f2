"""Computes the statistics on a person's page and on the owner's page."""

import statistics
import time
from collections.abc import Sequence

from common import numbers
from common.types import Json
from feedback import agreement
from feedback.agreement import Figure, Units
from feedback.fold import Event, disputed, relation
from feedback.items import LETTERS, SCALE
from feedback.store import Store

SHOWN = 200  # maximum number of decisions on a person's page


def spelled(ranks: Sequence[int | None]) -> str:
    """Returns ranks as text, such as "B > A = C". The letters A, B, ... name the answers in the order of `ranks`, which
    is the order on the page."""
    levels = sorted({rank for rank in ranks if rank is not None})
    groups = [" = ".join(LETTERS[i] for i, rank in enumerate(ranks) if rank == level) for level in levels]
    return " > ".join(groups) or "not ranked"


def sentence(event: Event, at: list[int]) -> str:
    """Returns a decision as text. The letters A, B, ... name the answers in the order in which the page shows them,
    which `at` gives."""
    content = event.content
    view = {"bad": "all bad", "skip": "skipped"}.get(content["choice"]) or spelled([content["ranks"][i] for i in at])
    more = [word for word, key in (("corrected", "edits"), ("flagged", "flags")) if content[key]]
    return ", ".join([view, *more])


def agree(event: Event, ranks: list[int | None]) -> bool:
    """Returns whether a vote agrees with the given ranks: on no pair of answers may the two prefer different
    answers."""
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i)]
    return all((relation(event.ranks, i, j) or 0) * (relation(ranks, i, j) or 0) >= 0 for i, j in pairs)


def percent(figure: Figure) -> str:
    """Returns a figure as text, such as "63 % (55-70, n 120)"."""
    return _spelled(figure, lambda x: f"{100 * x:.0f}", " %")


def kappa(figure: Figure) -> str:
    return _spelled(figure, lambda x: f"{x:.2f}", "", " to ")


def _spelled(figure: Figure, spell, unit: str, to: str = "-") -> str:
    value, low, high, n = figure
    if value is None:
        return numbers.NA
    between = "" if low is None or high is None else f"{spell(low)}{to}{spell(high)}, "
    return f"{spell(value)}{unit} ({between}n {n})"


def person(store: Store, name: str, units: Units | None = None) -> Json:
    """Returns the statistics for one annotator. The agreement with the judge leaves out votes that were given after the
    annotator had seen the judge's ranks."""
    state, items = store.state, store.items
    units = units or agreement.units(state, items.values())
    events = [event for event in state.of(name) if event.item in items]
    given = [event for event in events if event.content["choice"] != "skip"]
    blind = [event for event in given if not event.content.get("informed")]
    gold = [(event, ranks) for event in given if (ranks := items[event.item].gold)]
    judged = [(event, judge["ranks"]) for event in blind if (judge := items[event.item].judge)]
    ms = [event.content["ms"] for event in events]
    return {
        "name": name,
        "count": len(events),
        "figures": {
            "decisions": f"{len(events):,}",
            "skipped": f"{len(events) - len(given):,}",
            "median time": f"{statistics.median(ms) / 1000:.1f} s" if ms else numbers.NA,
            "agrees with others": percent(agreement.with_others(units, name)),
            "right on gold items": percent(agreement.with_ranks(gold)),
            "agrees with the judge": percent(agreement.with_ranks(judged)),
            "prefers the answer shown first": percent(agreement.first_shown(given)),
        },
        "flags": [text for event in events for text in event.content["flags"].values()],
        "rows": [_row(store, event) for event in events[::-1][:SHOWN]],
    }


def _row(store: Store, event: Event) -> Json:
    prompt = " ".join(store.items[event.item].turns[-1][1].split())
    when = time.strftime("%d %b %H:%M", time.gmtime(event.time))
    return {
        "when": when, "prompt": prompt[:120], "item": event.item, "version": event.version + 1,
        "decision": sentence(event, event.content["order"]), "ms": f"{event.content['ms'] / 1000:.1f} s",
    }  # fmt: skip


def everybody(store: Store) -> Json:
    state, items = store.state, list(store.items.values())
    units = agreement.units(state, items)
    found = agreement.of_all(units)
    contested = [item.hash for item in items if disputed(state.votes.get(item.hash, {}))]
    return {
        "people": [person(store, name, units) for name in store.people()],
        "items": len(items),
        "voted": sum(bool(state.votes.get(item.hash)) for item in items),
        "disputed": len(contested),
        "left": sum(name not in state.resolved for name in contested),
        "agreement": {
            "two people agree on a pair of answers": percent(found["share"]),
            "Fleiss' kappa": kappa(found["fleiss"]),
            "Krippendorff's alpha": kappa(found["alpha"]),
            **{f"Krippendorff's alpha of {k!r} ratings (interval scale)": kappa(v) for k, v in _ratings(store).items()},
        },
        "pairs": [(a, b, kappa(figure)) for (a, b), figure in agreement.of_pairs(units).items()],
    }


def _ratings(store: Store) -> dict[str, Figure]:
    return agreement.of_ratings(store.state, list(store.items.values()), SCALE)
