"""Training for notebook 12: one small classifier as the paper has it, and the same with one idea taken out.

    python variants.py full 0 FOLDER

trains with seed 0 on FOLDER/pictures.npy and labels.npy and writes "FOLDER/full 0.pt"; several can train at once.
"""

import os
import sys
from pathlib import Path
from types import MethodType

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import fast
from fast import ops

VARIANTS = {  # name: (alpha, whether kept tokens gather their neighbourhoods)
    "full": (4.0, True),
    "alpha 0": (0.0, True),
    "deletion": (4.0, False),
}


def merge_alone(merging, features, scores, kept, geometry):
    """Eq. 4 if each kept token were its only neighbour: (B, n, C), (B, n), (B, K) -> (B, K, C')."""
    parameters = ops.parameter_matrix(merging.weight_net)
    merged = ops.merge(features, scores, geometry.positions, kept, kept[..., None], parameters)
    return merging.linear(merging.norm(merged))


def delete_instead_of_merging(backbone):
    """Let the three merges of a backbone drop the tokens that are not kept; return the backbone."""
    for stage in backbone.stages[:3]:
        stage.merging.forward = MethodType(merge_alone, stage.merging)
    return backbone


def make(name, seed=0):
    """Make an untrained classifier of digits; all variants of a seed begin with the same weights."""
    alpha, gathers = VARIANTS[name]
    torch.manual_seed(seed)
    model = fast.create_model("aff_nano", num_classes=10, alpha=alpha)
    if not gathers:
        delete_instead_of_merging(model)
        for stage in model.stages[:3]:  # a fair start: W at distance 0 is 0 in a new network, and nothing would pass
            torch.nn.init.ones_(stage.merging.weight_net[1].bias)
    return model


def train(model, pictures, labels, batch=32, rate=2e-3):
    """Train on each picture once, in the order given.

    Parameters
    ----------
    model : AutoFocusFormer
    pictures : (N, H, W, 3) uint8 array
    labels : (N,) int64 array
    batch : int
    rate : float
        Highest learning rate; it rises over the first third of the steps and falls along a cosine.

    Returns
    -------
    (N // batch,) array
        The loss of each step.
    """
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # uint8: the model normalises them
    target, steps, losses = torch.from_numpy(labels), len(pictures) // batch, []
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=1 / 3)
    model.train()
    for step in range(steps):
        some = slice(step * batch, (step + 1) * batch)
        loss = torch.nn.functional.cross_entropy(model(images[some]), target[some])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return np.array(losses)


def main(name, seed, folder):
    """Train one variant on the pictures of a folder and leave its weights and losses there."""
    torch.set_num_threads(1)
    folder, model = Path(folder), make(name, int(seed))
    losses = train(model, np.load(folder / "pictures.npy"), np.load(folder / "labels.npy"))
    torch.save({"weights": model.state_dict(), "losses": torch.from_numpy(losses)}, folder / f"{name} {seed}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
