"""Renders chat templates in a separate process that only runs Jinja, within limits on time and memory.

Requests to the process, and its answers, are JSON texts, each preceded by its size, encoded in 8 bytes. A request is
[template, marks, variables], where `marks` are the two texts to put around each generation block. If `variables` is
null, the template is only compiled. An answer is ["text", rendered text], ["limit", description of the limit that was
exceeded] or ["error", reason].
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

CPU_SECONDS = 2.0  # limit on the CPU time of one rendering
SECONDS = 30.0  # limit on the elapsed time of one rendering, in case the process waits without using CPU time
MEMORY = 1 << 29  # maximum bytes of address space, including Python itself
MAX_REASON = 500  # characters
OUT_OF_MEMORY = 3  # exit code of a rendering process that ran out of memory


class Renderer:
    """The client of the process that renders templates. It starts the process when needed, and restarts it if it has
    died. Only one thread uses the process at a time."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, request: bytes) -> tuple[str, str]:
        """Sends a request to the process and returns the answer. If the process gives no answer, the process is killed,
        and ("limit", reason) is returned."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _started()
            try:
                _write(self._process.stdin.fileno(), request)
                return decoded(_read(self._process.stdout.fileno(), time.monotonic() + SECONDS))
            except OSError as error:
                self.close()
                return "limit", _why(error, self._process.returncode)
            except BaseException:  # otherwise the next request would read the answer to this request
                self.close()
                raise

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Disconnects a forked child process from the rendering process, which belongs to the parent."""
        if self._process:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.returncode = 0
        self.__init__()


def _started() -> subprocess.Popen:
    """Starts the rendering process, with the same Python and packages as this process. Ctrl-C in the terminal does not
    reach it."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from data.text import sandbox; sandbox.serve()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", program], bufsize=0, start_new_session=True, **pipes)


def _read(fd: int, end: float) -> bytes:
    return _bytes(fd, int.from_bytes(_bytes(fd, 8, end), "big"), end)


def _bytes(fd: int, size: int, end: float) -> bytes:
    parts, poll = [], select.poll()
    poll.register(fd, select.POLLIN)
    while size:
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise TimeoutError
        parts.append(os.read(fd, min(size, 1 << 20)))
        size -= len(parts[-1])
        if not parts[-1]:
            raise ConnectionResetError
    return b"".join(parts)


def _write(fd: int, message: bytes) -> None:
    data = memoryview(len(message).to_bytes(8, "big") + message)
    while data:
        data = data[os.write(fd, data) :]


def _why(error: Exception, code: int) -> str:
    if isinstance(error, TimeoutError):
        return f"rendering takes more than {SECONDS:g} s"
    if code == -signal.SIGPROF:
        return f"rendering takes more than {CPU_SECONDS:g} s of CPU time"
    if code == OUT_OF_MEMORY:
        return f"rendering takes more than {MEMORY >> 20} MiB of memory"
    return f"the rendering process ended with exit code {code}"


def encoded(message: Any) -> bytes:
    """Encodes a message as JSON. Values of unknown types become strings. Raises TypeError, ValueError or RecursionError
    if the message cannot be encoded."""
    return json.dumps(message, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def decoded(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))


# --- code that runs in the rendering process ---


def serve() -> None:
    """Reads requests from stdin and writes the answers to stdout, until stdin ends."""
    from data.text import jinja

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))
    try:
        while head := sys.stdin.buffer.read(8):
            request = decoded(sys.stdin.buffer.read(int.from_bytes(head, "big")))
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process when the time is up
            answer = encoded(_answer(jinja, *request))
            signal.setitimer(signal.ITIMER_PROF, 0)
            _write(1, answer)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _answer(jinja: Any, template: str, marks: tuple[str, str], variables: dict[str, Any] | None) -> tuple[str, str]:
    try:
        if variables is None:
            jinja.compiled(template)
            return "text", ""
        return "text", jinja.rendered(template, marks, variables)
    except MemoryError:
        raise
    except jinja.TooLong as error:
        return "limit", str(error)
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"[:MAX_REASON]
