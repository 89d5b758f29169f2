"""Opens run folders. A run folder contains everything needed to repeat the run, and only one launch at a time writes to
it."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from common import files, paths
from common.errors import UserError
from common.paths import Place
from common.types import Json, Leaf
from configs import schema
from model.io import saved
from train.keep import hosts
from train.keep.lease import Lease

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections", "rich")
# Files and folders that a run modifies in place; all other files are replaced as a whole.
GROWING = (files.LOCK, "metrics.jsonl", "ckpt", "profile", "tensorboard", "wandb")
ROOT = Path(__file__).resolve().parents[2]

# Config keys that a resume may change, including all keys nested below them.
# Most of them do not affect the state or the batches of any step. Others, such as `steps`, are a common reason to
# resume.
SAFE = (
    "steps", "epochs", "accum", "mesh", "model.attention", "xla_preset", "log_every", "eval_every", "eval_batches",
    "evals", "eval_n", "floors", "samples", "ckpt", "tracker", "chip", "allow", "data.cache",
)  # fmt: skip


class RunDir:
    """Opens `workdir` for one run, new or resumed, and holds its lock until `close` or the end of the process.

    For a run at gs://BUCKET/FOLDER, checkpoints are written directly to `home / "ckpt"`. The run's other files are
    written to `path`, a folder on this machine, and `publish` uploads those that have changed. For a local run, `path`
    is `home`.
    `config` is the resolved config as plain data, `overrides` are the overrides on the command line, and `source` is
    the config file. Raises UserError when the folder is in use or cannot be written, or when the processes of the
    launch differ in their configs or code. Also raises UserError when a resume changes the config, unless the config's
    `allow` contains "config" or, for keys under data, "data".
    """

    def __init__(
        self, workdir: str | Place, config: dict, overrides: dict[str, Leaf] | None = None, source: str | Path = ""
    ):
        self.home = paths.parse(workdir)
        self.path = files.mirror(self.home) if paths.remote(self.home) else self.home
        self.config = json.loads(json.dumps(config))  # as if read from JSON, with lists in place of tuples
        self.resumed, self.changes = False, []
        self._lock: int | None = None
        self._lease: Lease | None = None
        self._published: dict[str, tuple[int, int]] = {}
        hosts.require_same({"config": json.dumps(self.config, sort_keys=True), "code": code_digest()})
        try:
            hosts.refuse_together(self._open(overrides, source) if hosts.primary() else None)
        except UserError:
            self._unlock()
            raise
        self._stop = StopSignals()

    def stop_requested(self, step: int) -> bool:
        """Returns whether the run should save `step` and exit with exits.PREEMPTED, because it got SIGTERM or Ctrl-C.
        Call `stop_requested` after every step.

        All processes get True at the same step, no matter which of them got the signal.
        """
        return self._stop.requested(step)

    def publish(self) -> None:
        """If the run is in an object store, uploads the files that have changed. This method is called at the end of
        the run and before each save, because a resume on another machine needs the files."""
        if self._lease:
            with paths.store_errors(self.home):
                files.put(self.path, self.home, self._published)

    def close(self) -> None:
        self._stop.restore()
        try:
            self.publish()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lease:
            self._lease.close()
            self._lease = None
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, overrides: dict[str, Leaf] | None, source: str | Path) -> UserError | None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            paths.regular(self.path)
            if link := next((self.path / name for name in GROWING if (self.path / name).is_symlink()), None):
                return UserError("a run folder must not contain symbolic links", str(link), "remove the link")
            self._lock = take_lock(self.path / files.LOCK, self.home)
            if paths.remote(self.home):
                with paths.store_errors(self.home):
                    self._lease = Lease(self.home, holder())
                    files.fetch(self.home, self.path)
            self._compare()
            files.write_json(self.path / "config.json", self.config)
            files.write_json(self.path / "overrides.json", overrides or {})
            files.write_json(self.path / "environment.json", environment())
            if source:
                files.write(self.path / "config_source.py", Path(source).read_bytes())
            self.publish()
        except OSError as e:
            problem = f"the run folder cannot be used: {e.strerror or e}"
            return UserError(problem, str(self.path), "choose another --workdir")
        except UserError as e:
            return e
        return None

    def _compare(self) -> None:
        """Prints the config values that a resume changes. Raises UserError if a resume must not make one of these
        changes, or if `steps` is less than the number of steps already done."""
        self.resumed = bool(saved.steps(self.home / "ckpt"))
        where, step, recorded = self._recorded()
        if step > self.config.get("steps", step):
            fix = f"set steps to {step} or more, or use a new --workdir"
            raise UserError(f"{step} steps are done, but config.steps is {self.config['steps']}", str(self.home), fix)
        if not self.resumed or not recorded:
            return
        try:
            old, new = (schema.to_dict(schema.from_dict(c)) for c in (recorded, self.config))
        except (ValueError, TypeError) as e:
            raise UserError(f"this is not a config: {e}", where, "restore it from config_source.py") from e
        changed = dict(differences(old, new))
        self.changes = [f"{key}: {text}" for key, text in changed.items()]
        if self.changes:
            print("config changed since the last launch:", *self.changes, sep="\n  ")
        if "steps" in changed:
            print("the learning rate now follows the schedule for the new number of steps, so it may jump here")
        if refused := unsafe(changed, self.config.get("allow") or ()):
            problem = f"a resume must not change {'; '.join(f'{key}: {changed[key]}' for key in refused)}"
            name = "data" if all(_under(k, ("data",)) for k in refused) else "config"
            raise UserError(problem, str(self.path), f"use a new --workdir, or put {name!r} in config.allow")

    def _recorded(self) -> tuple[str, int, Json | None]:
        """Returns (file of the config, step, config) for the newest complete checkpoint. Earlier versions of
        Kungfu stored the config only in config.json."""
        step = 0
        for at in saved.steps(self.home / "ckpt"):
            with contextlib.suppress(saved.Damaged):
                manifest, step = saved.read_manifest(self.home / "ckpt" / str(at)), at
                if manifest.get("config"):
                    return str(self.home / "ckpt" / str(at)), step, manifest["config"]
                break
        path = self.path / "config.json"
        try:
            return str(path), step, json.loads(path.read_text()) if path.exists() else None
        except (ValueError, RecursionError) as e:
            raise UserError(f"the file is not JSON: {e}", str(path), "restore it from config_source.py") from e


def differences(old: Json | Leaf, new: Json | Leaf, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields a pair such as ("optim.lr", "0.1 -> 0.2") for every value that differs between two configs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, f"{json.dumps(old)} -> {json.dumps(new)}"


def unsafe(changed: Iterable[str], allow: Iterable[str]) -> list[str]:
    """Returns those of the changed config keys that a resume must not change, leaving out the ones that `allow`
    permits."""
    if "config" in allow:
        return []
    safe = (*SAFE, "data") if "data" in allow else SAFE
    return [key for key in changed if not _under(key, safe)]


def _under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def take_lock(path: Path, home: Place | None = None) -> int:
    """Takes an exclusive lock and returns its file descriptor. The kernel releases the lock when the process ends.

    If the lock is taken, raises a UserError that names the holder. Raises OSError if `path` is a symbolic link. Prints
    a warning if the file system does not support locks.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        before = os.pread(fd, 500, 0).decode(errors="replace").strip() or "another process"
        os.close(fd)
        where = str(home or path.parent)
        raise UserError(f"the run is in use by {before}", where, "stop it, or use a new --workdir") from None
    except OSError as e:
        problem = f"{path.parent} cannot be locked ({e.strerror}): start only one run at a time in it"
        print(f"warning: {problem}", file=sys.stderr)
    before = os.pread(fd, 500, 0).decode(errors="replace").strip()
    if before and f" on {socket.gethostname()} " not in before:
        print(f"warning: taking over the lock that {before} left behind", file=sys.stderr)
    os.ftruncate(fd, 0)
    os.pwrite(fd, holder().encode(), 0)
    return fd


def holder() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n"


class StopSignals:
    """Handles SIGTERM and Ctrl-C: the first signal asks the loop to stop, the second exits at once with 143 or 130.

    In a run with several processes, JAX's preemption service handles SIGTERM, so that all processes agree on a step to
    stop at.
    """

    def __init__(self) -> None:
        self.asked, self.agreed, self.before = False, False, {}
        if threading.current_thread() is threading.main_thread():
            own = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
            self.before = {number: signal.signal(number, self._on_signal) for number in own}

    def requested(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.asked
        if multihost_utils.reached_preemption_sync_point(step):
            self.asked = self.agreed = True
            self.before.setdefault(signal.SIGTERM, signal.signal(signal.SIGTERM, self._on_signal))
        return self.agreed

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        if self.asked:
            os.write(2, b"\nstopped at once; the last checkpoint remains\n")
            os._exit(128 + number)
        self.asked = True
        os.write(2, b"\nstopping after this step; signal again to stop at once\n")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


def environment() -> Json:
    """Returns everything that may affect a run's results, besides the config and the data."""
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "-uno"))},
        "code": code_digest(),
        "argv": sys.argv,
        "flags": {name: os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def code_digest() -> str:
    """Returns a single digest of all Python files in this repository's packages."""
    h = hashlib.sha256()
    for package in sorted(ROOT.glob("*/__init__.py")):
        for path in sorted(package.parent.rglob("*.py")):
            h.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return h.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _git(*args: str) -> str:
    """The output of a git command; "" outside a repository."""
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
