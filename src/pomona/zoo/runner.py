"""Runs a network's code in another process, with limits on time and memory."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pomona.errors import PomonaError

if TYPE_CHECKING:
    from pomona.data.task import Task

MEGABYTE = 2**20


@dataclass
class Outcome:
    """How a trial went: ``status`` as in :class:`pomona.zoo.Record`, one dict an epoch, and the weights' bytes."""

    status: str = "error"
    error: str = ""
    curve: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    weights: bytes | None = None
    pruned: bool = False


class Runner:
    """A process that runs one job after the other, each in a fork of its own.

    This bounds accidents (endless loops, too much memory, crashes); it is no sandbox against malice.

    Args:
        seconds: longest time for an epoch, and for building the network.
        memory: megabytes that a job may use beyond what torch itself does (CPU only).
        device: where networks are trained.
        threads: processor threads for a job.
    """

    def __init__(self, seconds: float = 60.0, memory: int = 2048, device: str = "cpu", threads: int = 1) -> None:
        if not hasattr(os, "fork"):
            raise PomonaError("the corpus runs code in limited processes, which needs Linux or macOS")
        self.seconds, self.memory, self.device, self.threads = seconds, memory, device, threads
        self._folder = Path(tempfile.mkdtemp(prefix="pomona-corpus-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._data: dict[str, Path] = {}

    def supported(self, code: str) -> set[str]:
        """What the code's ``supported_hyperparameters()`` returns.

        Raises:
            PomonaError: if it fails.
        """
        outcome = self.run(code, None, "acc", {}, 0, 0)
        if "supported" not in outcome.result:
            raise PomonaError(f"the network's code cannot be run: {outcome.error}")
        return set(outcome.result["supported"])

    def run(
        self,
        code: str,
        task: Task | None,
        metric: str,
        prm: dict[str, Any],
        seed: int,
        epochs: int,
        stop: Callable[[int, float], bool] | None = None,
    ) -> Outcome:
        """Train ``code`` on ``task``; ``stop(epoch, accuracy)`` may end it early."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        job = {"prm": prm, "seed": seed, "epochs": epochs, "metric": metric, "device": self.device}
        job |= {"seconds": self.seconds, "memory": self.memory * MEGABYTE, "threads": self.threads}
        if task is not None:
            job |= {"data": str(self._write(task)), "outputs": task.outputs.size}
        (folder / "network.py").write_text(code, encoding="utf-8")
        (folder / "job.json").write_text(json.dumps(job))
        try:
            outcome = self._follow(folder, epochs, stop)
            path = folder / "weights.safetensors"
            outcome.weights = path.read_bytes() if outcome.result and outcome.status == "ok" and path.exists() else None
            return outcome
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _follow(self, folder: Path, epochs: int, stop: Callable[[int, float], bool] | None) -> Outcome:
        outcome, pid, killed = Outcome(), 0, ""
        self._send(f"{folder}\n")
        while True:
            message = self._receive(self.seconds)
            if message is None and pid and not killed:
                killed = f"an epoch took longer than seconds={self.seconds:g}"
                _kill(pid)
                continue
            if message is None or "gone" in message:
                self._stop()
                outcome.error = killed or "the process that runs networks ended unexpectedly"
                return outcome
            if "pid" in message:
                pid = message["pid"]
            elif outcome.pruned and "exit" not in message:
                continue  # what it still said before it was ended would differ from run to run
            elif "epoch" in message:
                outcome.curve.append(message)
                if stop and message["epoch"] < epochs and stop(message["epoch"], message["accuracy"]):
                    outcome.pruned, killed = True, "pruned"
                    _kill(pid)
            elif "exit" in message:
                _kill(pid)  # and whatever it has started
                self._judge(outcome, message["exit"], killed)
                return outcome
            elif "error" in message:
                outcome.error = message["error"]
            else:
                outcome.result |= message

    @staticmethod
    def _judge(outcome: Outcome, code: int, killed: str) -> None:
        if outcome.pruned:
            outcome.status = "ok"
        elif killed or (code and not outcome.error):
            outcome.error = killed or f"the network's process ended with {_exit_name(code)}"
        elif not outcome.error and not outcome.result:  # the code called os._exit
            outcome.error = "the network's process ended before it was done"
        elif not outcome.error:
            accuracies = [point["accuracy"] for point in outcome.curve]
            finite = outcome.result.get("finite", True) and all(value == value for value in accuracies)
            outcome.status = "ok" if finite else "diverged"
            outcome.error = "" if finite else "weights or scores are not finite"

    def _write(self, task: Task) -> Path:
        import safetensors.torch
        import torch

        key = task.fingerprint()
        if key not in self._data:
            tensors: dict[str, torch.Tensor] = {}
            for name in ("train", "valid", "test"):
                x, y = task.splits[name]
                if task.outputs.kind == "number":  # networks learn standardised targets
                    y = (y - torch.tensor(task.outputs.mean or 0.0)) / torch.tensor(task.outputs.scale or 1.0)
                tensors |= {f"{name}_x": x.contiguous(), f"{name}_y": y.contiguous()}
            path = self._folder / f"{key}.safetensors"
            safetensors.torch.save_file({name: value.clone() for name, value in tensors.items()}, path)
            self._data[key] = path
        return self._data[key]

    def _send(self, line: str) -> None:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line.encode())

    def _start(self) -> None:
        # only what Python and torch need: keys and passwords in the environment are no business of the networks
        kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "TMPDIR", "LANG")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(self.threads)}
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pomona.zoo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        message = self._receive(300.0)
        if message is None or "ready" not in message:
            assert self._process is not None and self._process.stderr is not None
            self._process.kill()
            text = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self._stop()
            raise PomonaError(f"the process that runs networks did not start: {text[-1] if text else 'no message'}")

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message; ``None`` when there is none in time, ``{"gone": True}`` when the process has ended."""
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                return {"gone": True}
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def close(self) -> None:
        """End the process and remove its files."""
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _kill(group: int) -> None:
    if group:  # 0 would be our own
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def _exit_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
