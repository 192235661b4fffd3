"""The process in which a corpus's networks run: ``python -m pomona.zoo.worker``.

It imports torch once, then forks for each job named on its standard input. The fork limits its own memory and
processor time, trains, and writes a JSON line an epoch to standard output; the process that started it reads these,
and kills a fork that is late.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import Generator, Tensor, nn

from pomona.zoo import settings
from pomona.zoo.weights import encode

Emit = Callable[[dict[str, Any]], None]


class Batches:
    """Mini-batches of the training split in a new order at each pass; what ``learn`` is given."""

    def __init__(self, x: Tensor, y: Tensor, batch: int, apply: settings.Transform, seed: int) -> None:
        self.x, self.y, self.batch, self.apply = x, y, batch, apply
        self.order, self.noise = Generator().manual_seed(seed), Generator(x.device).manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.y), generator=self.order).to(self.x.device).split(self.batch):
            if len(chosen) > 1 or len(self) == 1:  # batch normalisation has no variance over one example
                yield self.apply(self.x[chosen], self.noise), self.y[chosen]


def load(path: Path) -> ModuleType:
    """The network's file as a module of its own."""
    spec = importlib.util.spec_from_file_location("network", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["network"] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor, apply: settings.Transform) -> Tensor:
    """The network's outputs in evaluation mode."""
    net.eval()
    return torch.cat([net(apply(part, None)) for part in x.split(512)])


def latency(net: nn.Module, x: Tensor) -> float:
    """Median seconds of a forward pass of one example."""
    times = []
    with torch.no_grad():
        for _ in range(10):
            start = time.perf_counter()
            net(x).sum().item()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def train(folder: Path, job: dict[str, Any], emit: Emit) -> None:
    """Train as the job says; each epoch is emitted, the weights are left in the folder."""
    module = load(folder / "network.py")
    supported = sorted(module.supported_hyperparameters())
    if job["epochs"] == 0:
        emit({"supported": supported})
        return
    settings.check_prm(job["prm"], set(supported))
    prm = settings.mapped({"batch": 32, "transform": "plain"} | job["prm"])
    device = torch.device(job["device"])
    data = {name: value.to(device) for name, value in safetensors.torch.load_file(job["data"]).items()}
    apply = settings.transform(prm["transform"])(data["train_x"])
    score = settings.score(job["metric"])
    random.seed(job["seed"])
    torch.manual_seed(job["seed"])
    net = module.Net(tuple(data["train_x"].shape[1:]), (job["outputs"],), prm, device).to(device)
    batches = Batches(data["train_x"], data["train_y"], prm["batch"], apply, job["seed"])
    net.train_setup(prm)
    for epoch in range(1, job["epochs"] + 1):
        start = time.perf_counter()
        net.train()
        net.learn(batches)
        duration = time.perf_counter() - start
        accuracy = score(outputs(net, data["valid_x"], apply), data["valid_y"])
        emit({"epoch": epoch, "accuracy": accuracy, "duration": duration})
    test = score(outputs(net, data["test_x"], apply), data["test_y"])
    state = net.state_dict()
    finite = all(value.isfinite().all().item() for value in state.values())
    (folder / "weights.safetensors").write_bytes(encode(state))
    parameters = sum(value.numel() for value in net.parameters())
    one = apply(data["valid_x"][:1], None)
    emit({"test": test, "parameters": parameters, "latency": latency(net, one), "finite": finite})


def limit(job: dict[str, Any]) -> None:
    """Bound this process's memory, processor time, files and core dumps."""
    seconds = int(job["seconds"] * (job["epochs"] + 2)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["memory"], job["memory"]))
    if job["device"] == "cpu":  # a GPU's driver reserves addresses far beyond what it uses
        pages = Path("/proc/self/statm")
        in_use = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 2**32
        resource.setrlimit(resource.RLIMIT_AS, (in_use + job["memory"],) * 2)


def explain(error: BaseException, path: Path) -> str:
    """The error in one line, with the line of the network's code it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" + (f" (line {lines[-1]} of the network's code)" if lines else "")


def child(folder: Path) -> None:
    """Run one job; never returns."""
    os.setsid()
    channel = os.dup(1)
    with open(os.devnull, "r+") as nothing:  # what the network prints is no part of the protocol
        for number in (0, 1, 2):
            os.dup2(nothing.fileno(), number)

    def emit(message: dict[str, Any]) -> None:
        os.write(channel, (json.dumps(message) + "\n").encode())

    try:
        job = json.loads((folder / "job.json").read_text())
        limit(job)
        os.chdir(folder)
        torch.set_num_threads(job["threads"])
        train(folder, job, emit)
    except BaseException as error:
        emit({"error": explain(error, folder / "network.py")})
    os._exit(0)


def warm_up() -> None:
    """Do what costs a second the first time, so that forks need not; nothing here starts a thread."""
    torch.set_num_threads(1)
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    for optimizer in (torch.optim.SGD([weight], 0.1), torch.optim.AdamW([weight], 0.1)):
        optimizer.step()


def main() -> None:
    """Fork for each folder named on standard input, until it ends."""
    warm_up()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(Path(line.strip()))
        os.write(1, (json.dumps({"pid": pid}) + "\n").encode())
        _, status = os.waitpid(pid, 0)
        os.write(1, (json.dumps({"exit": os.waitstatus_to_exitcode(status)}) + "\n").encode())


if __name__ == "__main__":
    main()
