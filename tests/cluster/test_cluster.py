"""Training on a head and three workers, placed by label. Each has an address of its own where that can be."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.faults.runs import Run, audit, below, end_ray, until

STEPS = 8
PLACED = (
    "train.workers=2", "train.node_labels={pool: train}", "sampler.actors=2", "sampler.cpus=1",
    "sampler.node_labels={pool: sample}", "run.placement_timeout_s=60",
)  # fmt: skip
SETTINGS = (*PLACED, f"train.max_steps={STEPS}", "judge.pretrain_steps=2", "train.log_interval=1")
NODES = {"head": (1, None), "train-1": (1, "train"), "train-2": (1, "train"), "sample": (2, "sample")}
"""CPUs and the label `pool` of each node: two workers of a CPU each have no room on one."""

ETC_NETNS = Path("/etc/netns")
"""`ip netns exec` shows what a folder of the namespace's name holds here as files of /etc."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass
class Nodes:
    """A cluster: its address, the raylet of every node, and how a driver of it is started."""

    address: str
    raylets: dict[str, psutil.Process]
    before: list[str] = field(default_factory=list)

    def run(self, folder: Path, *settings: str) -> Run:
        environment = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "QCRD_CACHE": str(folder / "driver")}
        return Run(folder, "run", *settings, before=self.before, **environment)

    def placed(self) -> dict[str, Counter[str]]:
        """Training workers and samplers of each node: the processes below its raylet."""
        found: dict[str, Counter[str]] = {name: Counter() for name in self.raylets}
        for name, raylet in self.raylets.items():
            for process in raylet.children(recursive=True):
                with suppress(psutil.Error):
                    title = "".join(process.cmdline()[:1])
                    found[name].update(kind for kind in ("RayTrainWorker", "Sampler") if f"ray::{kind}" in title)
        return found


def test_workers_and_samplers_are_placed_by_label_and_find_each_other(nodes: Nodes, tmp_path: Path) -> None:
    expected = {
        "head": {},
        "train-1": {"RayTrainWorker": 1},
        "train-2": {"RayTrainWorker": 1},
        "sample": {"Sampler": 2},
    }
    with nodes.run(tmp_path, *SETTINGS) as run:
        run.until(lambda: nodes.placed() == expected)
        result = run.wait()
    assert result["steps"] == STEPS
    assert result["training_starts"] == [0]
    audit(run.folder)


def test_what_has_no_room_ends_with_what_was_asked_for_and_what_there_is(nodes: Nodes, tmp_path: Path) -> None:
    begin = time.monotonic()
    with nodes.run(tmp_path, *SETTINGS, "train.workers=3", "run.placement_timeout_s=5") as run:
        run.wait(code=2)
    last = run.said.strip().splitlines()[-1]
    assert last.startswith(
        "error: not enough resources after 5 s (run.placement_timeout_s): asked for 3 workers of 1 CPU"
    )
    assert "on nodes with pool=train, 2 samplers of 1 CPU and 0 GPU on nodes with pool=sample" in last
    assert "the cluster has 5 CPU (5 free) and 0 GPU" in last
    assert "with pool=train there are 2 nodes with 2 CPU and 0 GPU in all" in last
    assert "with pool=sample there are 1 nodes with 2 CPU and 0 GPU in all" in last
    assert "Traceback" not in run.said
    print(f"ended {time.monotonic() - begin:.1f} s after its start")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    try:
        network = Network()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no network namespaces here: {error} {getattr(error, 'stderr', None) or ''}".rstrip())
        with one_address() as nodes:
            yield nodes
    else:
        with network, own_addresses(network, tmp_path_factory.mktemp("nodes")) as nodes:
            yield nodes


@contextmanager
def one_address() -> Iterator[Nodes]:
    """All nodes on this machine's address."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster()
    try:
        raylets = {}
        for name, (cpus, pool) in NODES.items():
            node = cluster.add_node(num_cpus=cpus, labels={"pool": pool} if pool else {})
            [raylet] = [info.process for info in node.all_processes["raylet"]]
            raylets[name] = psutil.Process(raylet.pid)
        cluster.wait_for_nodes()
        yield Nodes(cluster.address, raylets)
    finally:
        cluster.shutdown()
        if before is None:
            del os.environ["RAY_AUTH_MODE"]
        else:
            os.environ["RAY_AUTH_MODE"] = before


class Network:
    """A network namespace for every node, each with an address of its own, on one bridge.

    Raises:
        OSError, subprocess.SubprocessError: none can be made here.
    """

    def __init__(self) -> None:
        self.name = f"q{secrets.token_hex(2)}"
        self.net = f"10.77.{secrets.randbelow(256)}"
        self.namespaces: dict[str, str] = {}
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Network:
        return self

    def _make(self) -> None:
        # Debian's way of giving a machine's own name a loopback address; the others are known by name.
        hosts = ["127.0.0.1 localhost", f"127.0.1.1 {socket.gethostname()}"]
        hosts += [f"{self.address(node)} {node}.{self.name}" for node in NODES]
        ip("link", "add", self.name, "type", "bridge")
        ip("addr", "add", f"{self.net}.254/24", "dev", self.name)
        ip("link", "set", self.name, "up")
        for index, node in enumerate(NODES):
            space = f"{self.name}-{index}"
            self.namespaces[node] = space
            ip("netns", "add", space)
            (ETC_NETNS / space).mkdir(parents=True)
            (ETC_NETNS / space / "hosts").write_text("\n".join(hosts) + "\n")
            ip("link", "add", f"{space}v", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"{space}v", "master", self.name, "up")
            ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "route", "add", "default", "via", f"{self.net}.254")

    def __exit__(self, *_: object) -> None:
        for space in self.namespaces.values():  # and with them the links that end there
            with suppress(OSError, subprocess.SubprocessError):
                ip("netns", "del", space)
            shutil.rmtree(ETC_NETNS / space, ignore_errors=True)
        with suppress(OSError):  # it is another's where it is not empty
            ETC_NETNS.rmdir()
        with suppress(OSError, subprocess.SubprocessError):
            ip("link", "del", self.name)

    def address(self, node: str) -> str:
        return f"{self.net}.{list(NODES).index(node) + 1}"

    def inside(self, node: str) -> list[str]:
        """What a command line begins with that runs on a node."""
        return ["ip", "netns", "exec", self.namespaces[node]]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


@contextmanager
def own_addresses(network: Network, logs: Path) -> Iterator[Nodes]:
    temp = Path("/tmp") / f"qcrd-{secrets.token_hex(3)}"  # paths of sockets may have about a hundred characters
    starts: list[subprocess.Popen[bytes]] = []
    head = f"{network.address('head')}:6379"
    try:
        raylets = {}
        for name, (cpus, pool) in NODES.items():
            place = ["--head", "--port=6379", "--include-dashboard=false"] if name == "head" else [f"--address={head}"]
            options = [f"--num-cpus={cpus}", f"--node-ip-address={network.address(name)}", "--block",
                       "--object-store-memory=150000000", f"--temp-dir={temp / name}"]  # fmt: skip
            options += [f"--labels=pool={pool}"] if pool else []
            environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "QCRD_CACHE": str(temp / name / "cache")}
            command = [*network.inside(name), sys.executable, "-m", "ray.scripts.scripts", "start"]
            log = logs / f"{name}.log"
            with log.open("wb") as output:
                starts.append(
                    subprocess.Popen(
                        [*command, *place, *options], stdout=output, stderr=output, env=environment,
                        start_new_session=True,
                    )
                )  # fmt: skip
            raylets[name] = raylet_of(starts[-1], log)
        yield Nodes(head, raylets, network.inside("head"))
    finally:
        end_ray(*starts)
        shutil.rmtree(temp, ignore_errors=True)


def raylet_of(start: subprocess.Popen[bytes], log: Path) -> psutil.Process:
    """The raylet of a node, once the node has joined."""
    until(lambda: "Ray runtime started" in log.read_text(), 120, start, log)
    [raylet] = [process for process in below(start.pid, "") if process.name() == "raylet"]
    return raylet
