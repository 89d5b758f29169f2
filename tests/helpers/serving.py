"""A server of tools.serve in a thread."""

import contextlib
import threading

from common import loopback
from infer.serve import http as serving


@contextlib.contextmanager
def running(batcher, name="base"):
    """The port of a server in a thread, and a list of what ended it."""
    listening, server, errors = loopback.listen(0), serving.make(batcher, name), []

    def work():
        try:
            serving.run(server, batcher, listening)
        except BaseException as e:
            errors.append(e)

    port, thread = listening.getsockname()[1], threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield port, errors
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
