"""Networks of their own on this machine, whose links go down without a word.

Needs root and network namespaces. Nothing leaves the machine: the networks are joined to a bridge
that leads nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from types import TracebackType
from typing import Literal, Self

Link = Literal["open", "dead", "deaf", "dumb"]
"""``dead``: the link is down. ``deaf``: what the namespace sends is lost; ``dumb``: what it is
sent is."""
NOBODY = "02:00:00:00:00:01"


def ip(*words: str) -> bool:
    """Whether the system did it."""
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def why_not() -> str | None:
    """Why no network namespace can be made here; None where one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"t{os.getpid()}"
    try:
        made = ip("netns", "add", name)
    except FileNotFoundError:
        return "network namespaces need the command ip"
    if not made:
        return "no network namespace can be made here"
    ip("netns", "del", name)
    return None


class Network:
    """A namespace and its link to the bridge.

    Args:
        bridge: The bridge's name.
        here: The bridge's address.
        index: Which one it is.
    """

    def __init__(self, bridge: str, here: str, index: int) -> None:
        self._bridge, self._here = bridge, here
        self.name, self._near = f"{bridge}n{index}", f"{bridge}v{index}"
        self.address = f"{here.rpartition('.')[0]}.{index + 10}"
        far = f"{bridge}w{index}"
        inside = ("-n", self.name)
        assert ip("netns", "add", self.name)
        assert ip("link", "add", self._near, "type", "veth", "peer", "name", far)
        assert ip("link", "set", far, "netns", self.name)
        assert ip("link", "set", self._near, "master", bridge, "up")
        assert ip(*inside, "addr", "add", f"{self.address}/24", "dev", far)
        assert ip(*inside, "link", "set", far, "up")
        assert ip(*inside, "link", "set", "lo", "up")
        self._far = far

    def set(self, state: Link) -> None:
        """Let the link be so from now on."""
        there = ("-n", self.name, "neigh")
        assert ip("link", "set", self._near, "down" if state == "dead" else "up")
        # Frames for nobody are lost: no error comes back, and no other tool is needed for it.
        for words, address, device, lost in (
            (there, self._here, self._far, state == "deaf"),
            (("neigh",), self.address, self._bridge, state == "dumb"),
        ):
            if lost:
                assert ip(*words, "replace", address, "lladdr", NOBODY, "nud", "permanent",
                          "dev", device)  # fmt: skip
            else:
                ip(*words, "del", address, "dev", device)

    def close(self) -> None:
        """Take it down."""
        ip("link", "del", self._near)
        ip("netns", "del", self.name)


class Bridge:
    """What namespaces are joined to.

    Args:
        here: This side's address in a network of 256.
    """

    def __init__(self, here: str = "10.231.78.1") -> None:
        self.here, self._name = here, f"c{os.getpid()}"
        self._networks: list[Network] = []

    def __enter__(self) -> Self:
        """Make it."""
        assert ip("link", "add", self._name, "type", "bridge")
        assert ip("addr", "add", f"{self.here}/24", "dev", self._name)
        assert ip("link", "set", self._name, "up")
        return self

    def network(self) -> Network:
        """A further namespace."""
        self._networks.append(Network(self._name, self.here, len(self._networks)))
        return self._networks[-1]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take everything down."""
        with contextlib.suppress(FileNotFoundError):
            for network in self._networks:
                network.close()
            ip("link", "del", self._name)
