"""A tiny U-Net in PyTorch, trained on batches that are copied to the device ahead of the step.

python examples/unet_pytorch.py [cohort.h5] [--steps 40]
"""

from __future__ import annotations

from itertools import chain, islice, repeat
from pathlib import Path

import torch
from cohort import BATCH_SIZE, STRUCTURES, WINDOW, main
from torch import Tensor, nn
from torch.nn import functional

from parallel_dicomseg.loader import BatchLoader
from parallel_dicomseg.loader.adapters.pytorch import DevicePrefetcher


class UNet(nn.Module):
    """One level down, one up, with a skip: (b, 1, rows, columns) -> logits of the same size."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.outer = nn.Conv2d(1, width, 3, padding=1)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.last = nn.Conv2d(3 * width, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the structure, (b, 1, rows, columns); rows and columns are even."""
        outer = functional.relu(self.outer(image))
        inner = functional.relu(self.inner(functional.max_pool2d(outer, 2)))
        upper = functional.interpolate(inner, scale_factor=2.0, mode="nearest")
        logits: Tensor = self.last(torch.cat((outer, upper), dim=1))
        return logits


def train(file: Path, steps: int) -> list[float]:
    """Train for some steps over as many epochs as that takes; the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = UNet().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    with BatchLoader(
        file, BATCH_SIZE, structures=STRUCTURES, window=WINDOW, augment=("flip",)
    ) as loader:
        batches = DevicePrefetcher(loader, device)
        for batch in islice(chain.from_iterable(repeat(batches)), steps):
            logits = model(batch["image"])
            loss = functional.binary_cross_entropy_with_logits(logits, batch["mask"].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main(train, __doc__)
