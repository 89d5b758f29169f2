"""Reads the schedule of a TPU program from the compiler's listing of instruction bundles.

Without stalls, one bundle is issued per cycle. A branch back to the start of a region closes a loop. The number of
iterations is read from the loop's exit test. Some regions can be skipped by a forward branch and contain neither a
product nor a copy. If a sum takes several grid steps, such a region is assumed to run only in the first or the last of
these steps.
"""

import itertools
import math
import re
from typing import NamedTuple

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+[A-Z ]*:\s*(?:>\s*)*(\{.*)")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_TURNS = re.compile(r"scmp\.ge\.s32\.totalorder [^,]*, (\d+) /\* loop exit test")
_WORK = re.compile(r"\bvmatmul|\bdma\.")
_SPILL = re.compile(r"vst\S* \[vmem:\[#allocation\d+_spill")
DELAY = 4  # delay slots: number of bundles that are still issued after a branch
SMALL = 24  # a branch that skips at most this number of bundles only controls the pipeline, and is ignored


class Loop(NamedTuple):
    start: int  # index of the first bundle
    end: int  # index after the last bundle
    turns: int  # iterations


class Schedule(NamedTuple):
    """The schedule of one program."""

    cycles: int
    hot: int  # bundles per iteration of the hottest loop
    turns: int  # iterations of the hottest loop
    products: int  # MXU instructions per iteration of the hottest loop
    spills: int  # vector registers spilled per iteration of the hottest loop
    known: bool  # whether the iterations of every loop are known


def bundles(text: str) -> list[str]:
    """Returns the instructions of each bundle. A comment in the listing may span several lines."""
    found: list[str] = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            found.append(match.group(1))
        elif found:
            found[-1] += " " + line
    return found


def read(text: str, sums: int = 1) -> Schedule:
    """Returns the schedule of a listing. `sums` is the number of grid steps in which the kernel computes each sum. Code
    that only begins or ends a sum is counted in one of these steps."""
    code = bundles(text)
    starts = {region: i for i, b in enumerate(code) for region in _START.findall(b)}
    jumps = [(i, starts[r]) for i, b in enumerate(code) for r in _BRANCH.findall(b) if r in starts]
    loops, known = [], True
    for i, to in jumps:
        if to <= i:
            end = min(i + DELAY + 1, len(code))
            turns = _turns(code[to:end])
            known &= turns is not None
            loops.append(Loop(to, end, turns or 1))
    times = [math.prod(loop.turns for loop in loops if loop.start <= i < loop.end) for i in range(len(code))]
    work = list(itertools.accumulate((bool(_WORK.search(b)) for b in code), initial=0))
    cycles = list(times)
    for i, to in jumps:
        inside = any(loop.start < i and to <= loop.end for loop in loops)
        if to - i > SMALL and inside and work[i] == work[to]:
            cycles[i + 1 : to] = [math.ceil(n / sums) for n in times[i + 1 : to]]
    if not loops:
        return Schedule(len(code), len(code), 1, _count(r"\bvmatmul", code), len(_SPILL.findall("".join(code))), True)
    cost = lambda loop: sum(cycles[loop.start : loop.end])
    hot = max(loops, key=lambda loop: (cost(loop) - sum(cost(o) for o in loops if _within(o, loop)), loop.end))
    body = code[hot.start : hot.end]
    hot_bundles = sum(cycles[i] == times[i] for i in range(hot.start, hot.end))
    return Schedule(
        sum(cycles), hot_bundles, hot.turns, _count(r"\bvmatmul", body), len(_SPILL.findall("".join(body))), known
    )


def _within(inner: Loop, outer: Loop) -> bool:
    return inner != outer and outer.start <= inner.start and inner.end <= outer.end


def _count(pattern: str, code: list[str]) -> int:
    return sum(len(re.findall(pattern, b)) for b in code)


def _turns(body: list[str]) -> int | None:
    """Returns the number of iterations of a loop, according to its last exit test. A pipelined loop over windows has
    two more iterations, to fill and drain the pipeline, which are not counted. Returns None if there is no exit
    test."""
    tests = [int(n) for b in body for n in _TURNS.findall(b)]
    if not tests:
        return None
    return max(tests[-1] - 2 * any("stage = 1" in b for b in body), 1)
