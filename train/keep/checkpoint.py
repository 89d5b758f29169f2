"""Saves a run atomically and resumes it from the newest complete checkpoint.

A checkpoint is written to `ckpt/<step>.tmp` in the background, and renamed to `ckpt/<step>` once all its files are on
disk, including the manifest with checksums. A process killed at any moment therefore leaves either a complete
checkpoint or a `.tmp` folder, which the next start removes. In an object store a checkpoint is written in place, and is
complete once its manifest, which is written last, exists. All processes of a run must see the same folder.
"""

import itertools
import re
import sys
import time
from collections.abc import Callable, Container, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from common import files, paths
from common.errors import UserError
from common.paths import Place
from common.types import Config, Json
from model.io import saved
from model.io.saved import MANIFEST, Damaged
from train.keep import hosts
from train.source import Source
from train.state import TrainState

UNFINISHED = re.compile(r"[0-9]+\.(tmp|orbax-checkpoint-tmp).*")
CLOCK_STEPS = 10  # with several processes, `minutes` is checked only every 10 steps, since the check synchronizes them

Abstract = dict[str, jax.ShapeDtypeStruct]  # {path: abstract array}


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Checkpointer:
    """Saves and restores a TrainState without its `frozen` weights, whose digests are saved and checked instead.

    `cfg` and `allow` are the config's `ckpt` and `allow`. `log` is called with one line about every damaged checkpoint
    and failed save. `first` is called before each save, and writes to disk everything that must not be older than the
    checkpoint. `config` is the run's config as plain data, and is stored in the manifest of every checkpoint.
    `passed` holds the evaluated steps at which no metric crossed a limit in the config's `floors`. The newest
    checkpoint of such a step is never deleted.
    """

    def __init__(
        self,
        folder: str | Place,
        cfg: Config,
        allow: Iterable[str] = (),
        log: Callable[[str], None] = warn,
        first: Callable[[], None] = lambda: None,
        config: Json | None = None,
    ):
        place = paths.parse(folder)
        self.folder = place if paths.remote(place) else place.resolve()
        self.cfg, self.allow, self.log, self.first = cfg, tuple(allow), log, first
        self.config = config
        self._saved: int | None = None  # the last step that was restored or saved; None after a failure
        self._begun = 0  # the last step that was restored or whose save was started, even if the save failed
        self.passed: Container[int] = ()
        self._when = time.monotonic()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._frozen: dict[str, str] | None = None
        if hosts.primary():
            if not paths.remote(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()

    def restore(self, state: TrainState, source: Source) -> TrainState:
        """Loads the newest complete checkpoint with the shardings of `state`, or returns `state` itself if there is no
        such checkpoint. `state` may be abstract except for `frozen`.

        Damaged checkpoints are reported and renamed to `invalid-<step>-<n>`. Raises UserError if the shapes, data or
        frozen weights of a complete checkpoint differ from those of this run.
        """
        damaged = False
        while (step := hosts.broadcast(next(iter(saved.steps(self.folder)), -1))) >= 0:
            problem, restored = self._load(step, state, source)
            if restored is not None:
                self._saved = self._begun = step
                self._when = time.monotonic()
                return restored
            damaged = True
            self.log(f"the checkpoint of step {step} is skipped: {problem}")
            self._set_aside(self.folder / str(step))
        if damaged:
            self.log(f"no complete checkpoint is left in {self.folder}: starting at step 0")
        return state

    def maybe_save(self, step: int, state: TrainState, source: Source, force: bool = False) -> bool:
        """Starts a save if one is due, by steps or by minutes, and returns whether a save was started. Call
        `maybe_save` after every resumable step. A save that becomes due between resumable steps is made at the next
        resumable step.

        The arrays are copied before this method returns, so the next step may donate them. If a save fails, the error
        is reported when the next save starts, or by `close`. It is raised as UserError or, with on_error="continue",
        logged.
        """
        if not (force or self._due(step)):
            return False
        self.wait()
        if step == self._saved:
            return False
        self._begin(step, state, source)
        return True

    def wait(self, must: bool = False) -> None:
        """Waits until the save in progress is on disk. Raises UserError if the save failed, unless on_error is
        "continue" and `must` is False."""
        if self._pending is None:
            return
        error, self._pending = self._pending.exception(), None
        stop = must or self.cfg.on_error == "stop"
        if (error and stop) or not hosts.all_true(error is None):
            # A process that must stop does not call `all_true` first: the other processes may be waiting for it in
            # Orbax.
            self._failed(error, stop)

    def _failed(self, error: BaseException | None, stop: bool) -> None:
        """Reports that a save failed on this process, or on another one if `error` is None. Raises UserError if `stop`
        is True."""
        step, self._saved = self._saved, None
        reason = saved.first_line(error) if error else "another process failed"
        message = f"the checkpoint of step {step} could not be written: {reason}"
        if stop:
            raise UserError(message, str(self.folder), "make room and run the same command again") from error
        self.log(f"{message}; the run continues")

    def last_passed(self) -> int | None:
        """Returns the newest saved step that is in `passed`, or None."""
        return next((step for step in saved.steps(self.folder) if step in self.passed), None)

    def close(self) -> None:
        """Waits until the save in progress is on disk. Raises UserError if the save failed, unless on_error is
        "continue"."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # The error may be on this process only, so the other processes would not take part in `wait`.
            self._writer.shutdown()

    def _due(self, step: int) -> bool:
        if self.cfg.every and step // self.cfg.every > self._begun // self.cfg.every:
            return True
        if not self.cfg.minutes or (jax.process_count() > 1 and step % CLOCK_STEPS):
            return False
        return bool(hosts.broadcast(time.monotonic() - self._when >= 60 * self.cfg.minutes))

    def _begin(self, step: int, state: TrainState, source: Source) -> None:
        final = self.folder / str(step)
        part = final if paths.remote(final) else self.folder / f"{step}.tmp"
        if hosts.primary():
            self._remove_unfinished()
            if final.exists():
                self._set_aside(final)
        hosts.broadcast(0)
        self._saved = self._begun = step
        self._when = time.monotonic()
        if error := self._prepare():
            self._pending = Future()
            self._pending.set_exception(error)
            return
        arrays = saved.named(state.replace(frozen=None))
        manifest = {
            "step": step,
            "leaves": saved.describe(arrays),
            "frozen": self._fingerprints(state),
            "source": source.state_dict(),
            "config": self.config,
        }
        try:
            response = saved.orbax().save_async(part, arrays)
        except Exception as e:
            if self.cfg.on_error == "stop":
                self._failed(e, stop=True)
            self._pending = Future()
            self._pending.set_exception(e)
        else:
            self._pending = self._writer.submit(self._commit, response, manifest, part, final)

    def _prepare(self) -> Exception | None:
        """Calls `first`. Returns the error that `first` raised, a RuntimeError if it failed only on another process, or
        None if it succeeded on all processes."""
        error = None
        try:
            self.first()
        except Exception as e:
            error = e
        return None if hosts.all_true(error is None) else error or RuntimeError("another process failed")

    def _commit(self, response: Future, manifest: dict, part: Place, final: Place) -> None:
        """Waits until the arrays are written, and then completes the checkpoint. This method runs in the writer
        thread."""
        try:
            response.result()
            if hosts.primary():
                saved.finish(part, manifest)
                if not paths.remote(self.folder):
                    part.rename(final)
                    files.sync(self.folder)
                self._prune()
        except BaseException:
            if hosts.primary():
                self._remove_unfinished()
            raise

    def _prune(self) -> None:
        """Deletes all checkpoints except the newest `keep`, those at multiples of `keep_every`, and the newest one
        whose step is in `passed`."""
        last_passed = self.last_passed()
        for step in saved.steps(self.folder)[self.cfg.keep :]:
            if step != last_passed and (not self.cfg.keep_every or step % self.cfg.keep_every):
                doomed = self.folder / str(step)  # a partly deleted folder must not look complete
                if paths.remote(doomed):
                    (doomed / MANIFEST).unlink()
                else:
                    doomed = doomed.rename(self.folder / f"{step}.tmp")
                files.remove(doomed)

    def _load(self, step: int, state: TrainState, source: Source) -> tuple[str, TrainState | None]:
        """Reads the checkpoint of a step. Returns ("", state), or (problem, None) if the checkpoint is damaged."""
        folder, abstract = self.folder / str(step), _abstract(state)
        problem, manifest = self._attempt(lambda: saved.read_manifest(folder))
        if not problem:
            self._check(manifest, abstract, state, source)
            problem, arrays = self._attempt(lambda: saved.read(folder, abstract))
        if not problem:
            problem, _ = self._attempt(lambda: saved.verify(folder, arrays, manifest))
        if problem:
            return problem, None
        source.load_state_dict(manifest["source"] | _fingerprint(source))
        return "", saved.fill(state.replace(frozen=None), arrays).replace(frozen=state.frozen)

    def _attempt(self, action: Callable[[], Any]) -> tuple[str, Any]:
        """Calls `action`, which reads from a checkpoint. Returns ("", result), or (problem, None) if any process finds
        the checkpoint damaged."""
        problem, result = "", None
        try:
            result = action()
        except Damaged as e:
            problem = str(e)
        return (problem, result) if hosts.all_true(not problem) else (problem or "damaged on another process", None)

    def _check(self, manifest: Json, abstract: Abstract, state: TrainState, source: Source) -> None:
        """Raises UserError when a complete checkpoint does not belong to this run."""
        where, step = str(self.folder), manifest["step"]
        leaves = {name: (tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in manifest["leaves"].items()}
        wanted = {name: (x.shape, str(x.dtype)) for name, x in abstract.items()}
        for name in sorted(leaves.keys() | wanted.keys()):
            if leaves.get(name) != wanted.get(name):
                was, want = (_shape(tree.get(name)) for tree in (leaves, wanted))
                problem = f"parameter {name} is {was} in step {step}, but {want} in this run"
                raise UserError(problem, where, "use a new --workdir")
        if (of := self._moved(manifest["frozen"], state)) and "config" not in self.allow:
            problem = f"the frozen weights of {of} differ from those of step {step}: `init` or the hardware has changed"
            raise UserError(problem, where, "undo this change, or put 'config' in config.allow")
        data = manifest["source"].get("fingerprint")
        if data != _fingerprint(source).get("fingerprint") and "data" not in self.allow:
            fix = "restore the files, or put 'data' in config.allow"
            raise UserError(f"the data differ from those of step {step}", where, fix)

    def _moved(self, recorded: dict[str, str] | str, state: TrainState) -> str:
        """Returns the names of the roles whose frozen weights do not match the recorded digests, or "" if all match."""
        if isinstance(recorded, str):  # earlier versions of Kungfu stored a single digest for all roles
            copies = {role: state.role(role) for role in dict(state.shares)}
            whole = state.frozen | copies
            return "" if recorded == saved.fingerprint(whole) else "the run"
        now = self._fingerprints(state)
        return ", ".join(role for role in sorted(now | recorded) if now.get(role) != recorded.get(role))

    def _fingerprints(self, state: TrainState) -> dict[str, str]:
        if self._frozen is None:
            self._frozen = saved.fingerprints(state.frozen)
        return self._frozen

    def _tidy(self) -> None:
        """Removes the folders of interrupted saves; warns about files that are not checkpoints."""
        self._remove_unfinished()
        ours = {str(step) for step in saved.steps(self.folder)}
        foreign = sorted(name for name in self._names() if name not in ours and "invalid-" not in name)
        if foreign:
            self.log(f"{self.folder}: ignoring {', '.join(foreign[:5])}: not a checkpoint")

    def _remove_unfinished(self) -> None:
        whole = set(map(str, saved.steps(self.folder)))
        for name in self._names():
            begun = paths.remote(self.folder) and name not in whole and saved.STEP.fullmatch(name)
            if begun or UNFINISHED.fullmatch(name):
                files.remove(self.folder / name)

    def _names(self) -> list[str]:
        return [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []

    def _set_aside(self, folder: Place) -> None:
        if hosts.primary():
            names = (self.folder / f"invalid-{folder.name}-{n}" for n in itertools.count())
            folder.rename(next(name for name in names if not name.exists()))


def _abstract(state: TrainState) -> Abstract:
    leaves = saved.named(state.replace(frozen=None))
    return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in leaves.items()}


def _shape(leaf: tuple | None) -> str:
    return f"{leaf[1]}{list(leaf[0])}" if leaf else "absent"


def _fingerprint(source: Source) -> dict:
    """Returns {"fingerprint": ...}, the entry of a source's state that identifies its data, or {} if the source has no
    fingerprint."""
    return {k: v for k, v in source.state_dict().items() if k == "fingerprint"}
