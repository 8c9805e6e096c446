"""Real servers, started in environments of their own that `make servers` makes; one at a time, as they are large."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


class RealServer:
    """A process that answers at ``url`` once it is built.

    Args:
        command: with what it is started.
        url: where it will answer; None: it prints that in its first line.
        environment: further variables.
        seconds: that it may take until it answers.
    """

    def __init__(
        self, command: list[str], url: str | None, environment: dict[str, str] | None = None, seconds: float = 1200.0
    ) -> None:
        self.log = tempfile.NamedTemporaryFile("w+", encoding="utf-8", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            ["nice", "-n", "5", *command],
            stdout=subprocess.PIPE if url is None else self.log,
            stderr=self.log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""} | (environment or {}),
        )
        if url is None:
            assert self.process.stdout is not None
            url = self.process.stdout.readline().strip()
        self.url, end = url, time.monotonic() + seconds
        try:
            while not self._answers():
                assert self.process.poll() is None, self.output
                assert time.monotonic() < end, self.output
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise

    @property
    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5):
                return True
        except (OSError, ValueError, urllib.error.URLError):
            return False

    def kill(self) -> None:
        """Kills it with all that it started: vLLM's engine outlives a server that is killed."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def python_of(environment: str) -> str:
    """The interpreter of an environment of `make servers`; the test is skipped where there is none."""
    path = ROOT / environment / "bin" / "python"
    if not path.exists():
        pytest.skip(f"needs a real server: there is no {environment}, which `make servers` makes")
    return str(path)


def llama(model: Path) -> RealServer:
    """llama.cpp's server of a GGUF file."""
    return RealServer([python_of(".venv-llama"), str(Path(__file__).with_name("llama.py")), str(model)], None)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def vllm(model: Path, *options: str, port: int | None = None) -> RealServer:
    """vLLM's server of a folder, on a CPU and in float32: in bfloat16 log-probs are up to 0.27 nats off."""
    python = python_of(".venv-vllm")
    port = port or free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", *options]
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return RealServer(command, f"http://127.0.0.1:{port}", environment)
