"""Two nodes on one machine: network namespaces with an address each, joined by a cable (veth)."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """One namespace, with the address and the interface of its end of the cable."""

    name: str
    address: str
    interface: str

    def popen(self, arguments: list[str], **options) -> subprocess.Popen:
        """Start a program in the namespace."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *arguments], **options)


def enter(name: str) -> None:
    """Let this process, of one thread, go on in a namespace."""
    with Path("/run/netns", name).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Make two nodes that reach each other and nothing else; needs root."""
    tag = f"{os.getpid() % 100000}"
    nodes = tuple(Node(f"node{i}-{tag}", f"10.77.0.{i + 1}", f"v{i}-{tag}") for i in range(2))
    made = []
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
            made.append(node)
        first, other = nodes
        _ip("link", "add", first.interface, "type", "veth", "peer", "name", other.interface)
        for node in nodes:
            _ip("link", "set", node.interface, "netns", node.name)
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.interface)
            _ip("-n", node.name, "link", "set", node.interface, "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield first, other
    finally:
        for node in made:  # its end of the cable goes with it
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True)
