"""Looks up the properties of accelerators in chips.json, which cites a source and a date for each number. This module
loads quickly because it does not import jax."""

import json
import platform
from pathlib import Path
from typing import NamedTuple


class Number(NamedTuple):
    value: float
    low: float
    high: float
    quality: str  # "published" | "derived" | "estimate"
    source: str
    date: str  # date on which the source was read


class Chip(NamedTuple):
    """One accelerator in chips.json. Unknown values are None."""

    name: str
    devices: int  # jax devices per chip
    tflops: Number  # peak dense bf16, 1e12 FLOP/s
    hbm_bytes: Number
    hbm_bandwidth: Number  # bytes/s
    ici_bandwidth: Number  # bytes/s per direction, summed over all interconnect links of the chip
    usd_hour: Number | None  # USD per chip-hour, on demand
    usd_hour_spot: Number | None
    watts: Number  # average power of the chip; if the source's figure includes part of the host's power, so does this
    cci: Number | None  # compute carbon intensity, gCO2e per 1e18 utilized FLOPs (Schneider et al. 2025)
    dcn_bandwidth: Number | None = None  # bytes/s per chip over the network between slices


class Site(NamedTuple):
    """The data center that is assumed when energy and carbon emissions are estimated."""

    region: str
    gco2_per_kwh: Number  # location-based carbon intensity of the grid
    pue: Number  # power usage effectiveness: power of the whole data center divided by the power of its machines


def find(name: str) -> Chip | None:
    """Finds a chip by its name, such as "v6e", or its jax device_kind, such as "TPU v6 lite". Returns None if
    chips.json does not list the chip."""
    return _CHIPS.get(name.lower())


def site() -> Site:
    return Site(_TABLE["region"]["name"], Number(**_TABLE["region"]["gco2_per_kwh"]), Number(**_TABLE["pue"]))


_TABLE = json.loads(Path(__file__).with_name("chips.json").read_text("utf-8"))
_CHIPS = {
    key.lower(): Chip(name, **{k: Number(**v) if isinstance(v, dict) else v for k, v in row.items() if k != "aliases"})
    for name, row in _TABLE["chips"].items()
    for key in (name, *row["aliases"])
}


def processor() -> str:
    """The name of this machine's processor, or "cpu" if the operating system does not report a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "cpu"
