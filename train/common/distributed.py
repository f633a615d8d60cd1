"""One process or many: what ``torchrun`` started, and the few sums they share.

Process groups, reductions and the gradient exchange are torch.distributed's. Accelerate or Lightning would bring their
own loop, sampler and checkpoint, with which neither exact resuming nor results that do not depend on the number of
processes would be ours to promise; what is left to write are the few lines below.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError


class Ranks:
    """This process among all.

    Parameters
    ----------
    device : str
        "auto" (a GPU if there is one), "cpu" or "cuda".

    Attributes
    ----------
    rank, size : int
        This process's number and how many there are; 0 and 1 without torchrun.
    device : torch.device
        Where this process computes.
    """

    def __init__(self, device: str = "auto"):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = choose_device(device)
        self.started = self.size > 1
        if self.started:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sums(self, values: list[float]) -> list[float]:
        """Add each number over all processes, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """Collect a plain Python value of every process, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Let the processes share gradients; a lone process keeps its model."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        """Leave the group."""
        if self.started:
            dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into this process's device."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"run.device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch sees no GPU: pass --run.device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device
