"""`--profile=N` traces N steps for Perfetto and XProf, and prints the most expensive operations."""

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from train.keep import hosts


class Trace:
    """Traces `steps` steps of this session (0: none), starting with the second step, since the first step compiles."""

    def __init__(self, steps: int, folder: Path):
        self.steps, self.folder, self.traced = max(0, steps), folder, -1  # -1: not started

    def tick(self, done: int, result: Any) -> None:
        """Starts or ends the trace at the right step. Call `tick` after dispatching step `done` of the session.
        `result` is any of the arrays that the step returned."""
        if self.steps and done == 1:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
        if self.steps and 1 <= done <= self.steps + 1:
            self.traced = done - 1
        if self.steps and done == self.steps + 1:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self.traced < 0:
            return
        try:
            jax.profiler.stop_trace()
        except Exception as e:  # a problem such as a full disk must not end the run
            print(f"warning: {self.folder}: the trace could not be written: {e}", file=sys.stderr)
        steps, self.traced, self.steps = self.traced, -1, 0
        files = sorted(self.folder.rglob("perfetto_trace.json.gz"), key=lambda p: p.stat().st_mtime)
        if hosts.primary() and files and steps:
            print(f"{files[-1]}: open this trace in ui.perfetto.dev", table(files[-1], steps), sep="\n", flush=True)


def table(path: Path, steps: int, rows: int = 10) -> str:
    """A table of the operations with the most self time (without nested operations) on all devices of this host."""
    seconds, calls = own_seconds(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])
    total = sum(seconds.values())
    lines = [f"{'ms/step':>10} {'share':>6} {'calls/step':>12}  operation"]
    for name, s in sorted(seconds.items(), key=lambda item: item[1], reverse=True)[:rows]:
        lines.append(f"{1e3 * s / steps:>10.3f} {s / total:>6.1%} {calls[name] / steps:>12.1f}  {name}")
    return "\n".join(lines) if total else "the trace contains no operations"


def own_seconds(events: list[dict]) -> tuple[dict[str, float], dict[str, int]]:
    """Returns ({operation: self time in seconds}, {operation: number of calls}). The self time excludes operations that
    are nested in the operation on the same thread, such as the body of a `while` loop."""
    ops = [e for e in events if e.get("ph") == "X" and {"hlo_op", "hlo_category"} & e.get("args", {}).keys()]
    seconds, calls, open_ops = defaultdict(float), defaultdict(int), defaultdict(list)
    for e in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        name = e["args"].get("hlo_op", e["name"])
        name = e["name"] if name.startswith("command_buffer") else name  # a command buffer launches many kernels
        stack = open_ops[e["pid"], e["tid"]]
        while stack and stack[-1][1] <= e["ts"]:
            stack.pop()
        if stack and "correlation_id" not in e["args"]:  # GPU kernels may overlap, but are not nested
            seconds[stack[-1][0]] -= e["dur"] / 1e6
        seconds[name] += e["dur"] / 1e6
        calls[name] += 1
        stack.append((name, e["ts"] + e["dur"]))
    return seconds, calls
