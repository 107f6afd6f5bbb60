"""Binds the listening sockets of all servers: the pages, the enrolment listener and the embedded broker."""

import socket

from models.errors import UnavailableError


def listen(host: str, port: int, *, code: str, backlog: int = 128) -> socket.socket:
    """Returns a bound TCP socket that listens.

    Args:
        host: Address to bind; one with a colon is IPv6.
        port: 0 chooses a free port.
        code: Error code of a port that is not free, such as `server.port_in_use`.
        backlog: Connections that may wait to be accepted.

    Raises:
        UnavailableError: `code`: the address cannot be used; free the port or choose another.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Two servers may bind with SO_REUSEADDR; listening is what only one can do.
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise UnavailableError(
            code,
            f"Cannot listen on {host}:{port}: {error.strerror}. Stop what uses the port, or choose another.",
            expected="a free port",
            got=f"{host}:{port}",
        ) from error
    return listener
