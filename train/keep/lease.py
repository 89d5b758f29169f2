"""Locks a run in an object store. Unlike a file lock, this lock remains if its process is killed."""

import os
import re
import socket
import sys
import threading
import time

from common import exits, files, paths
from common.errors import UserError
from common.paths import Place

BEAT = 20.0  # seconds between heartbeats
LOCK = re.compile(r"LOCK\.(\d+)")


class Lease:
    """Holds the object LOCK.<n> in `folder`, and rewrites it every BEAT seconds until `close`.

    A killed run leaves its lock behind, but no longer rewrites it. If a lock has not changed for three BEATs, another
    process may take over by creating LOCK.<n+1>. The store lets only one process create this object. `holder` names the
    process and its host. A lock from the same host is taken over at once: because this process has the run's local file
    lock, the process that left the object must be dead. Raises UserError when the run is in use.
    """

    def __init__(self, folder: Place, holder: str):
        self.folder, self.holder, self._stop = folder, holder, threading.Event()
        while True:
            held = _held(folder)
            if held:
                self._watch(folder / f"LOCK.{held[-1]}")
            self.number = held[-1] + 1 if held else 0
            self.path = folder / f"LOCK.{self.number}"
            if paths.create(self.path, holder):
                break
        for n in held:
            (folder / f"LOCK.{n}").unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _watch(self, path: Place) -> None:
        """Waits to see whether the holder of a lock is alive. Returns if the holder has died, and raises UserError
        otherwise."""
        before = _read(path)
        if f" on {socket.gethostname()} " in before:
            return
        print(f"waiting {3 * BEAT:.0f} s: is the run still in use? {before}", end="", file=sys.stderr, flush=True)
        time.sleep(3 * BEAT)
        if (after := _read(path)) and after != before:
            who = after.splitlines()[0]
            raise UserError(f"the run is in use by {who}", str(self.folder), "stop it, or use a new --workdir")

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(BEAT):
            try:
                # Check for a later lock too: this process may have rewritten its own lock after a takeover removed it.
                if _held(self.folder)[-1:] != [self.number] or not _read(self.path).startswith(self.holder):
                    os.write(2, f"\n{self.path} was taken over: another process continues this run\n".encode())
                    os._exit(exits.PREEMPTED)
                beats += 1
                files.write(self.path, f"{self.holder}beat {beats}\n")
            except Exception as e:  # the network may recover; if not, the next save fails
                print(f"warning: {self.path}: {e}", file=sys.stderr)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.path.unlink(missing_ok=True)
        except Exception as e:  # the lock expires by itself
            print(f"warning: {self.path}: {e}", file=sys.stderr)


def _held(folder: Place) -> list[int]:
    """Returns the numbers of the existing locks. The glob pattern skips the checkpoints in the same folder, which saves
    requests."""
    return sorted(int(m[1]) for m in (LOCK.fullmatch(path.name) for path in folder.glob("LOCK.*")) if m)


def _read(path: Place) -> str:
    """The text of a lock; "" if it was deleted."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
