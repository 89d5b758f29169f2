"""Opens a listening socket that only programs on this machine can reach."""

import socket

from common.errors import UserError

HOST = "127.0.0.1"
BACKLOG = 2048  # maximum number of connections that wait until the server accepts them


def listen(port: int) -> socket.socket:
    """Opens a listening socket on the loopback interface. Port 0 selects any free port. Raises UserError if the port is
    in use."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"{port} is not a port", "--port", "0 to 65535")
    try:
        return socket.create_server((HOST, port), backlog=BACKLOG)
    except OSError as e:
        raise UserError(e.strerror or str(e), f"port {port}", "choose another --port") from None
