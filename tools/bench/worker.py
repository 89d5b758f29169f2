"""Runs each implementation in a separate process, without shared threads or memory, in alternating rounds.

The parent writes a line to request a round, and the child answers with a line of JSON. The child exits when its
standard input is closed.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.types import Json

Round = Json  # tokens, seconds and cpu_seconds (None if CPU time is not measured)


class Worker:
    """The parent's handle to a child process. The constructor returns when the child has loaded, compiled and warmed
    up."""

    def __init__(self, module: str, case: dict):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self.child = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={"JAX_PLATFORMS": "cpu", **os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # idle threads must not spin
        )
        self.case = case
        self._answer()

    def round(self) -> Round:
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return self._answer()

    def peak_bytes(self) -> int:
        """Ends the child and returns its peak memory."""
        self.child.stdin.close()
        return self._answer()["peak_bytes"]

    def _answer(self) -> dict:
        line = self.child.stdout.readline()
        if not line:
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no output"])[-1]
            raise UserError(f"the benchmark process ended early: {last}", json.dumps(self.case))
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()
        self.log.close()


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(sides: dict[str, Callable[..., Callable[[], Round]]], peak: Callable[[], int] = peak_memory) -> None:
    """Runs the main loop of the child process. `sides[what](**case)` prepares a benchmark and returns a function that
    runs one round."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers

    def answer(content: dict) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    case = json.loads(sys.argv[1])
    run = sides[case.pop("what")](**case)
    run()  # compiles and warms up
    answer({})
    for _ in sys.stdin:
        answer(run())
    answer({"peak_bytes": peak()})


def timed(f: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds and CPU seconds that `f` takes."""
    start, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - start, time.process_time() - cpu


def decoding(generate: Callable[[int], Any], batch: int, new_tokens: int) -> Round:
    """Measures the time of `generate(new_tokens)` minus the time of `generate(1)`, to exclude the prompt and the first
    token. The round is repeated if other programs delayed `generate(1)` so much that the difference is not positive."""
    seconds = cpu = 0.0
    for _ in range(10):
        first, whole = timed(lambda: generate(1)), timed(lambda: generate(new_tokens))
        seconds, cpu = (b - a for a, b in zip(first, whole, strict=True))
        if seconds > 0:
            break
    return {"tokens": batch * (new_tokens - 1), "seconds": seconds, "cpu_seconds": cpu}


def asked(data: str, questions: int, shots: int) -> list[str]:
    """Returns prompts with the same `shots` solved examples before each question. Only the first line of each example's
    answer is used."""
    rows = [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
    solved = [f"{row['prompt']}{row['completion'].strip().splitlines()[0]}\n\n" for row in rows[:shots]]
    return ["".join(solved) + row["prompt"] for row in rows[shots : shots + questions]]
