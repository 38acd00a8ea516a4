"""TCP ports of this machine."""

from __future__ import annotations

import ipaddress
import socket

HOST = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there; a name other than localhost might lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def busy_reason(host: str, port: int) -> str | None:
    """Why a server could not listen there, in the system's words; None if it could."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was closed a moment ago is free
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None
