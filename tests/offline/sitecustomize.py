"""With this folder on PYTHONPATH a Python process, and every Python that it starts, reaches nothing but this machine.

A connection or a look-up of a name elsewhere raises ConnectionError. `make test` builds the smoke book under it.
"""

import ipaddress
import sys

HERE = {"", "localhost", "ip6-localhost", None, b"", b"localhost"}


def refuse_other_machines(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a path is a socket of this machine
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    if host in HERE:
        return
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        if ipaddress.ip_address(text.partition("%")[0]).is_loopback:
            return
    except ValueError:  # a name
        pass
    raise ConnectionError(f"{event} to {text!r}: the book must be built without a network")


sys.addaudithook(refuse_other_machines)
