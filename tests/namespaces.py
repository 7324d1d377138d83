"""Two hosts on one machine: network namespaces joined by a virtual link, each with its own host name.

Needs root and iproute2. Nothing outside the two namespaces is touched.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

__all__ = ["Hosts"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """host-a (10.213.7.1) and host-b (10.213.7.2); a context manager that removes them again."""

    names = ("host-a", "host-b")
    addresses = ("10.213.7.1", "10.213.7.2")

    def __init__(self) -> None:
        self._spaces = [f"iwm{os.getpid()}{end}" for end in "ab"]
        self.devices = [f"iwm{os.getpid()}{end}" for end in "ab"]

    def __enter__(self) -> Hosts:
        for space in self._spaces:
            _ip("netns", "add", space)
        _ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for space, device, address in zip(self._spaces, self.devices, self.addresses, strict=True):
            _ip("link", "set", device, "netns", space)
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", space, "link", "set", device, "up")
            _ip("-n", space, "link", "set", "lo", "up")
            # A connection over a cut link fails after about ten seconds, not after a quarter of an hour: torchrun's own
            # agent waits as long as the system does (docs/guides/distributed.md).
            _ip("netns", "exec", space, "sysctl", "-q", "-w", "net.ipv4.tcp_retries2=5")
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)

    def start(self, host: int, command: Sequence[str], environment: dict[str, str], log: int) -> subprocess.Popen[str]:
        """Start a process on a host, in a session of its own, with its output in `log`."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.names[host]} && exec "$@"', "host", *command]
        return subprocess.Popen(
            ["ip", "netns", "exec", self._spaces[host], *named],
            env=environment | {"GLOO_SOCKET_IFNAME": self.devices[host]},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def cut(self) -> None:
        """Take the link down: packets vanish without an error."""
        _ip("-n", self._spaces[0], "link", "set", self.devices[0], "down")

    def mend(self) -> None:
        """Bring it up again."""
        _ip("-n", self._spaces[0], "link", "set", self.devices[0], "up")

    def slow(self, host: int, megabits: int) -> None:
        """Limit the rate at which the host sends from now on; what it receives stays as fast."""
        shaped = ["root", "tbf", "rate", f"{megabits}mbit", "burst", "128kb", "latency", "200ms"]
        _ip("netns", "exec", self._spaces[host], "tc", "qdisc", "add", "dev", self.devices[host], *shaped)

    def sent_bytes(self, host: int) -> int:
        """Return the bytes that a host has sent over the link so far."""
        where = f"/sys/class/net/{self.devices[host]}/statistics/tx_bytes"
        shown = subprocess.run(
            ["ip", "netns", "exec", self._spaces[host], "cat", where], check=True, capture_output=True, text=True
        )
        return int(shown.stdout)
