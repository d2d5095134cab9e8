"""Plain data parallelism: one process a GPU (or CPU), started by torchrun or alone."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def average_(self, tensor: torch.Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.world)

    def from_main(self, value: float) -> float:
        """The main process's value, everywhere."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return tensor.item()

    def copy_main_(self, tensors: list[torch.Tensor]) -> None:
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def join() -> Group:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Group(rank, world, device)


def set_up_torch(group: Group, seed: int) -> None:
    """Seeds that differ by process, and the settings that training needs."""
    torch.manual_seed(seed + group.rank)
    torch.set_float32_matmul_precision("high")
    # The backward passes of the other two fused attention kernels failed in training.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch._dynamo.config.recompile_limit = 64


def leave(group: Group) -> None:
    if group.world > 1:
        dist.destroy_process_group()
