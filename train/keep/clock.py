"""Measures throughput and cost, and counts non-finite steps. The training loop calls the clock at every step."""

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from common import chips
from common.types import Config, Json
from train import cost
from train.init import Blueprint
from train.keep.metrics import means
from train.objectives import Pair
from train.optim import schedule
from train.source import Counts, local_rows


class Clock:
    """Counts tokens, FLOPs and seconds of the current session in this process.

    Every process reads the same number of rows. Processes that differ only in their position on the context or tensor
    axis read the same rows.
    """

    def __init__(self, cfg: Config, plan: Blueprint):
        self.cost = cost.of_plan(plan, cfg.data.seq_len)
        self.roles = cost.of_roles(plan, cfg.data.seq_len)
        self.schedule = jax.jit(schedule(cfg.optim, cfg.steps))
        self.chip = chips.find(cfg.chip or jax.devices()[0].device_kind)
        assert isinstance(plan.mesh, Mesh), "only --plan uses an abstract mesh"
        mine = local_rows(plan.mesh, cfg.data.batch_size)
        # This process counts only its own rows. Counts are multiplied by `parts` to cover the whole batch.
        self.parts = cfg.data.batch_size // (mine.stop - mine.start)
        self.bad = 0  # consecutive non-finite steps before this session
        self.pending: dict[str, Pair] = {}  # metrics of the second-to-last step
        self.last: dict[str, Pair] = {}
        self.since = time.perf_counter()
        self.steps = 0
        self.counts: Counter[str] = Counter()  # counts since the last metrics line
        self.since_line = 0  # steps since the last metrics line
        self.busy, self.timed = 0.0, 0  # total seconds and tokens of all metrics lines so far

    def tick(self, sums: dict[str, Pair], counts: Counts) -> None:
        """Counts a step. Call `tick` after each step is dispatched. The first step includes compilation and is left out
        of the rates."""
        self.steps += 1
        self.pending, self.last = self.last, sums
        if self.steps == 1:
            jax.block_until_ready(sums)
            self.since = time.perf_counter()
        else:
            self.since_line += 1
            self.counts.update(counts)

    def bad_steps(self) -> int:
        """The number of consecutive non-finite steps up to the second-to-last step. Waiting for the last step would
        leave the device idle."""
        return int(self.pending["bad"][0]) if self.pending else self.bad

    def line(self, done: int, seen: Counts) -> Json:
        """Returns the numbers for a metrics line: the last step's metrics, the rates since the previous line, and the
        FLOPs of all tokens `seen` by the run so far.

        MFU is None for a chip whose peak FLOPs are unknown.
        """
        out: Json = means(self.last)
        out |= {k: int(out[k]) for k in ("bad", "skipped")}
        out["lr"] = float(self.schedule(done - 1 - out["skipped"]))  # skipped steps do not advance the schedule
        out["flops"] = self._flops(seen)
        now, n = time.perf_counter(), self.parts
        seconds, self.since = now - self.since, now
        if tokens := self.counts["tokens"]:
            out["tokens_per_second"] = n * tokens / seconds
            out["seconds_per_step"] = seconds / self.since_line
            out["mfu"] = cost.mfu(self._flops(self.counts) / seconds, self.chip, jax.device_count())
            self.busy, self.timed = self.busy + seconds, self.timed + tokens
        self.counts.clear()
        self.since_line = 0
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the with-block, such as an evaluation or a save, from the step time."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def totals(self, seen: Counts) -> Json:
        """Returns totals over all sessions of the run, computed from `seen`, and the throughput and peak memory of this
        session."""
        n = self.parts
        return {
            "tokens": n * seen["tokens"],
            "targets": n * seen["targets"],
            "flops": self._flops(seen),
            "tokens_per_second": n * self.timed / self.busy if self.busy else None,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def _flops(self, counts: Counts) -> float:
        """Returns the FLOPs of all processes, for training steps and for the extra forward passes that a sampling
        source runs."""
        total = self.cost.step(counts["tokens"], counts["targets"])
        for role, price in self.roles.items():
            total += price.forward().step(counts.get(f"{role}/tokens", 0), counts.get(f"{role}/targets", 0))
        return self.parts * total
