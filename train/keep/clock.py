"""Rates, cost and the watch for broken numbers, from what the loop sees of each step."""

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
    """Counts tokens, FLOPs and seconds of this process's session. All processes have as many rows each, though some
    have the same: those that share out their columns or their heads."""

    def __init__(self, cfg: Config, plan: Blueprint):
        self.cost = cost.of_plan(plan, cfg.data.seq_len)
        self.roles = cost.of_roles(plan, cfg.data.seq_len)
        self.schedule = jax.jit(schedule(cfg.optim, cfg.steps))
        self.chip = chips.find(cfg.chip or jax.devices()[0].device_kind)
        assert isinstance(plan.mesh, Mesh), "only a plan has an abstract one"
        mine = local_rows(plan.mesh, cfg.data.batch_size)
        self.parts = cfg.data.batch_size // (mine.stop - mine.start)  # of the batch, each counted by a process
        self.bad = 0  # non-finite steps in a row before this session
        self.pending: dict[str, Pair] = {}  # metrics of the step before the last
        self.last: dict[str, Pair] = {}
        self.since = time.perf_counter()
        self.steps = 0
        self.counts: Counter[str] = Counter()  # since the last line
        self.since_line = 0  # steps
        self.busy, self.timed = 0.0, 0  # seconds and tokens of the lines so far

    def tick(self, sums: dict[str, Pair], counts: Counts) -> None:
        """After a step was dispatched. The first one compiles: its time is not a rate."""
        self.steps += 1
        self.pending, self.last = self.last, sums
        if self.steps == 1:
            jax.block_until_ready(sums)
            self.since = time.perf_counter()
        else:
            self.since_line += 1
            self.counts.update(counts)

    def bad_steps(self) -> int:
        """Non-finite steps in a row up to the step before the last: waiting for the last would idle the device."""
        return int(self.pending["bad"][0]) if self.pending else self.bad

    def line(self, done: int, seen: Counts) -> Json:
        """The last step's means, rates since the line before, FLOPs of all that the run has `seen`.

        A chip without a known peak has no MFU.
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
        """What happens inside (evaluation, a save) is no step's time."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def totals(self, seen: Counts) -> Json:
        """What the whole run took, over its sessions (`seen`); the rate and the memory are this session's."""
        n = self.parts
        return {
            "tokens": n * seen["tokens"],
            "targets": n * seen["targets"],
            "flops": self._flops(seen),
            "tokens_per_second": n * self.timed / self.busy if self.busy else None,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def _flops(self, counts: Counts) -> float:
        """Of all processes: the steps, and what a source took through its roles to sample."""
        total = self.cost.step(counts["tokens"], counts["targets"])
        for role, price in self.roles.items():
            total += price.forward().step(counts.get(f"{role}/tokens", 0), counts.get(f"{role}/targets", 0))
        return self.parts * total
