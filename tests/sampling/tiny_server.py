"""A vLLM server of a small model, on the CPU, in processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from qcrd_ray.models.scratch import build_scratch

MODEL = "tiny"
CONTEXT = 256
"""Tokens of a prompt and its continuation at most."""
_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


@contextlib.contextmanager
def tiny_server(folder: Path) -> Iterator[str]:
    """The URL of a server of a random model, without `/v1`."""
    texts = [f"What is {a} + {b}? {a} + {b} = {a + b}." for a in range(40) for b in range(5)]
    model = build_scratch("llama-tiny", texts, folder / "llama", seed=0)
    template = folder / "chat.jinja"
    template.write_text(_TEMPLATE)
    settings = {
        "dtype": "bfloat16",
        "max-model-len": CONTEXT,
        "chat-template": template,
        "generation-config": "vllm",
    }
    with server_of(model, MODEL, folder, settings) as url:
        yield url


@contextlib.contextmanager
def server_of(
    model: Path, name: str, folder: Path, more: Mapping[str, object] | None = None, start_seconds: float = 240.0
) -> Iterator[str]:
    """The URL of a server of a model's folder, without `/v1`. No process of it is left at the end.

    Args:
        folder: for its log.
        more: options of `vllm serve`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "model": model,
        "served-model-name": name,
        "host": "127.0.0.1",
        "port": port,
        "max-num-seqs": 16,
        **(more or {}),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(server, url, start_seconds, log)
        yield url
    finally:
        _end_group(server)


def _await_health(server: subprocess.Popen[bytes], url: str, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{url}/health"):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start in {seconds:.0f} s:\n{log.read_text()[-4000:]}")


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """The engine's process is in the server's group, and outlives a server that is killed alone."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, end)
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            server.poll()
            try:
                os.killpg(server.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
    raise RuntimeError("processes of the server are left")
