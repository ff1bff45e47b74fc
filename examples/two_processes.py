"""Two processes, one model: DistributedDataParallel, each process contrasting its own batch.

    torchrun --nproc_per_node=2 examples/two_processes.py

Runs on CPUs (gloo), and on GPUs (nccl) where every process has one. What DDP averages are the gradients of the
processes' losses; the memory bank stays each process's own.
"""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
from generated import table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sadcl import SampleContrastiveLoss

gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
dist.init_process_group("nccl" if gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")

torch.manual_seed(0)  # the same weights everywhere
features, labels = (part.to(device) for part in table(rows=512))
classes, width = labels.shape[1], 64
encoder = nn.Sequential(nn.Linear(features.shape[1], 128), nn.ReLU(), nn.Linear(128, classes * width))
model = DistributedDataParallel(nn.Sequential(encoder, nn.Unflatten(1, (classes, width))).to(device))
loss_of = SampleContrastiveLoss(temperature=0.2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

order = torch.Generator().manual_seed(0)  # the same shuffle everywhere, dealt out
for step in range(60):
    mine = torch.randperm(len(features), generator=order)[: 64 * world][rank::world]
    loss = loss_of(model(features[mine]), labels[mine])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 19 or step == 0:
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: mean loss of {world} processes {mean.item() / world:.4f}")

total = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()]).sum()
sums = [torch.zeros_like(total) for _ in range(world)]
dist.all_gather(sums, total)
if rank == 0:
    print("weights are the same in every process:", all(bool(other == total) for other in sums))
# What holds the group goes before it: else a thread of torch's may still run when Python ends, which then aborts.
del model, encoder, optimizer, loss
gc.collect()
dist.destroy_process_group()
