"""Training workers on several machines find each other by the addresses that Ray knows their nodes by."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class ProcessGroupConfig(TorchConfig):
    """TorchConfig whose workers offer each other their node's address.

    Left to itself gloo offers what the machine's own name stands for, which on many machines is a loopback address
    (Debian writes 127.0.1.1 into /etc/hosts): workers of two nodes then wait for each other until their timeout.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeAddresses


class _NodeAddresses(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Have gloo use the network interface that has the node's address, unless the environment names one."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(INTERFACE, interface)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address, None where none has."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.family in (socket.AF_INET, socket.AF_INET6) and one.address == address for one in found):
            return name
    return None
