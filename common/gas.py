"""Computes the resources that a run used (FLOPs, chip-hours, dollars, energy and carbon emissions) from its
metrics.jsonl and from chips.json, without importing jax."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from common import chips
from common.numbers import percent, short
from common.types import Json

REPLAYED = ("data", "step")  # kinds of work that are done again when a restart repeats steps
COVERED = 0.9  # if power samples cover less than this fraction of a session, its energy is only estimated


class Session(NamedTuple):
    """One launch of a run."""

    devices: Json
    spent: dict[str, float]  # seconds per kind of work, such as "step", over the whole launch
    kept: dict[str, float]  # the same, but only up to the last step that no later launch repeated
    joules: dict[str, list[float]]  # see train.keep.power


class Range(NamedTuple):
    value: float
    low: float
    high: float

    def __mul__(self, x: float) -> "Range":
        return Range(*(x * y for y in self))


class Gas(NamedTuple):
    """The resources used by one or more runs, or by one or more launches of a run (sessions). Unknown values are None,
    such as the price of a chip that chips.json does not list."""

    chips: tuple[str, ...] = ()  # names in chips.json; for other chips, jax's device_kind
    flops: float | None = None  # training FLOPs, counted from einsum equations; excludes repeated steps and evaluations
    peak: float | None = None  # FLOPs that the chips could have computed in `hours` at their peak rate
    hours: float | None = None  # chip-hours from launch to end, including compilation, idle time and repeated steps
    replayed: float | None = None  # chip-hours of steps repeated after a restart
    usd: float | None = None  # at on-demand prices
    usd_spot: float | None = None
    kwh: Range | None = None  # includes the data center's overhead (PUE), unless chips.json lacks the chip
    kwh_measured: float | None = None  # the part of kwh.value that comes from measured power
    co2_kg: Range | None = None  # from kwh, location-based
    co2_kg_cci: float | None = None  # cross-check, computed from compute carbon intensity; includes embodied emissions
    seconds: dict[str, float] = {}  # seconds by kind of work; "lost" is the time of repeated steps

    @property
    def mfu(self) -> float | None:
        """Model FLOPs divided by the FLOPs that the chips could have computed at their peak rate from launch to end,
        including compilation and idle time."""
        return self.flops / self.peak if self.flops is not None and self.peak else None

    @property
    def goodput(self) -> float | None:
        """The fraction of all seconds that was spent in training steps. The time of repeated steps counts as lost."""
        return self.seconds.get("step", 0.0) / sum(self.seconds.values()) if any(self.seconds.values()) else None

    def __str__(self) -> str:
        site, flops = chips.site(), "n/a" if self.flops is None else f"{self.flops:.1e}".replace("e+", "e")
        unit = "chip-h" if all(map(chips.find, self.chips)) else "device-h"
        again = f" ({short(self.replayed)} replayed)" if self.replayed else ""
        share = self.kwh_measured / self.kwh.value if self.kwh else 0
        how = "measured" if share > 0.999 else "partly measured" if share else "estimate"
        parts = (
            f"{flops} model FLOPs (MFU {percent(self.mfu)})",
            f"{short(self.hours)} {' + '.join(self.chips)} {unit}{again}",
            "$ n/a" if self.usd is None else f"${short(self.usd)} on demand (${short(self.usd_spot)} spot)",
            _text(self.kwh, "kWh", how),
            _text(self.co2_kg, "kgCO2e", f"{site.region}, PUE {site.pue.value:g}"),
        )
        strange = [name for name in self.chips if not chips.find(name)]
        unknown = f"n/a: {', '.join(strange)} is not in common/chips.json"
        why = [f"{unknown}; a training run can name its chip with --config.chip"] if strange else []
        return "gas: " + " · ".join([*parts, *why])

    def goodput_line(self) -> str:
        spent = " · ".join(f"{kind} {short(s)} s" for kind, s in self.seconds.items() if s)
        everything = short(sum(self.seconds.values()))
        return f"goodput: {percent(self.goodput)} of {everything} s in training steps · {spent}"


def sessions(lines: Iterable[dict]) -> list[Session]:
    """Reads the launches of a run from the lines of its metrics.jsonl.

    Each launch begins with a "session" event, which also contains the totals of the previous launch. The seconds in
    each line are totals since the launch. When a restart repeats steps, the old lines of these steps are removed. The
    last remaining line of a launch therefore has the total for the steps that were not repeated.
    """
    found, now = [], Session({}, {}, {}, {})
    for line in lines:
        if line.get("kind") == "task":
            continue  # its seconds are not totals: they cover only one evaluation
        spent, joules = line.get("seconds") or {}, line.get("joules") or {}
        if line.get("event") == "session":
            if spent:
                found.append(now._replace(spent=spent, joules=joules))
            now = Session(line.get("devices") or {}, {}, {}, {})
        elif spent:
            now = now._replace(spent=spent, kept=spent, joules=joules)
    return [*found, now] if now.spent else found


def line(lines: Iterable[dict], environment: Json, chip: str = "") -> Gas:
    """Computes the resources used by a run from the lines of its metrics.jsonl. If these lines do not name the run's
    devices, as in older runs, the devices are read from `environment`, the content of its environment.json.

    `chip` is the value of config.chip, the name of a chip in chips.json. If it is given, all devices of the run are
    assumed to be this chip.
    """
    lines = list(lines)
    used = total(_of_session(s, s.devices or environment.get("devices") or {}, chip) for s in sessions(lines))
    flops = [x["flops"] for x in lines if x.get("flops") is not None and x.get("kind") != "task"]
    cci = chips.find(used.chips[0]).cci if len(used.chips) == 1 and used.peak else None
    co2 = flops[-1] / 1e18 * cci.value / 1000 if cci and flops else None
    return used._replace(flops=flops[-1] if flops else None, co2_kg_cci=co2)


def _of_session(s: Session, devices: Json, name: str) -> Gas:
    kind = devices.get("kind", "unknown")
    count = devices.get("processes" if kind == "cpu" else "count")  # jax may split one CPU into several devices
    chip, site = chips.find(name or kind), chips.site()
    lost = {k: s.spent.get(k, 0.0) - s.kept.get(k, 0.0) for k in REPLAYED}
    seconds = {k: x - lost.get(k, 0.0) for k, x in s.spent.items()} | {"lost": sum(lost.values())}
    joules = _measured(s, devices)
    kwh = Range(joules, joules, joules) * (1 / 3.6e6) if joules else None
    used = Gas((chip.name if chip else kind,), kwh=kwh, kwh_measured=kwh and kwh.value, seconds=seconds)
    if not count:
        return used
    n = count / (chip.devices if chip else 1)
    hours = n * sum(s.spent.values()) / 3600
    used = used._replace(hours=hours, replayed=n * seconds["lost"] / 3600)
    if not chip:
        return used
    kwh = (kwh or Range(*chip.watts[:3]) * (hours / 1000)) * site.pue.value
    return used._replace(
        peak=hours * 3600 * chip.tflops.value * 1e12,
        usd=chip.usd_hour and hours * chip.usd_hour.value,
        usd_spot=chip.usd_hour_spot and hours * chip.usd_hour_spot.value,
        kwh=kwh,
        kwh_measured=kwh.value if joules else 0.0,
        co2_kg=kwh * (site.gco2_per_kwh.value / 1000),
    )


def _measured(s: Session, devices: Json) -> float | None:
    """The joules that all devices used in a session, extrapolated from power samples on the first host. Returns None if
    the fraction of the session's time that the samples cover is below COVERED."""
    host, wall = devices.get("kind") == "cpu", sum(s.spent.values())
    joules, covered = s.joules.get("cpu" if host else "gpu", (0.0, 0.0))
    if covered < COVERED * wall or not covered or (host and devices.get("processes") != 1):
        return None
    return joules * wall / covered * (1 if host else devices.get("count", 0))


def total(parts: Iterable[Gas]) -> Gas:
    """Adds up the resources of several sessions or runs. If a value is unknown for any of them, its total is None."""
    parts = list(parts)
    return Gas(*map(_sum, zip(*parts, strict=True))) if parts else Gas()


def _sum(values: tuple) -> Any:
    first = values[0]
    if any(x is None for x in values):
        return None
    if isinstance(first, Range):
        return Range(*map(sum, zip(*values, strict=True)))
    if isinstance(first, tuple):
        return tuple(dict.fromkeys(x for names in values for x in names))
    if isinstance(first, dict):
        return {k: sum(x.get(k, 0.0) for x in values) for k in dict.fromkeys(k for x in values for k in x)}
    return sum(values)


def _text(r: Range | None, unit: str, about: str) -> str:
    if r is None:
        return f"n/a {unit}"
    span = "" if r.low == r.high else f"{short(r.low)}-{short(r.high)}, "
    return f"{short(r.value)} {unit} ({span}{about})"
