"""What a run sets for all of PyTorch, and its state: generators, optimiser, training mode."""

import random

import numpy as np
import torch
from torch import nn

from ..common.distributed import Ranks
from ..common.errors import UserError, one_line
from .layers import is_frozen


def random_states() -> dict:
    """Collect the states of python's, NumPy's and torch's generators, as tensors and plain containers.

    Numbers are in tensors: of a checkpoint of 1,000 ranks, lists would be more than is read.
    """
    name, keys, place, has_gauss, gauss = np.random.get_state()
    version, inner, last = random.getstate()
    return {
        "python": (version, torch.tensor(inner), last),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict) -> None:
    """Restore generators to the states that ``random_states`` collected.

    Raises
    ------
    UserError
        They are something else.
    """
    try:
        version, inner, gauss = states["python"]
        random.setstate((version, tuple(inner.tolist() if isinstance(inner, torch.Tensor) else inner), gauss))
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(states["torch"])
        if states["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f"the states of random generators are damaged ({one_line(error)})") from error


def set_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restore an optimiser's state.

    Raises
    ------
    UserError
        It is that of other parameters, or none.
    """
    names = [sorted(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        groups = optimizer.param_groups
        numbers = [group[name] for group in groups for name in ("lr", "weight_decay", "eps")]
        fits = all(type(number) in (int, float) for number in numbers)
        fits = fits and all(len(group["betas"]) == 2 for group in groups)
        fits = fits and all(set(before) <= set(group) for before, group in zip(names, groups, strict=True))
        for parameter, values in optimizer.state.items():
            shapes = [tuple(value.shape) for value in values.values() if isinstance(value, torch.Tensor)]
            fits = fits and all(shape in ((), tuple(parameter.shape)) for shape in shapes)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(f"the optimiser's state does not fit the model ({one_line(error)})") from error
    if not fits:
        raise UserError("the optimiser's state does not fit the model")


def seed_everything(seed: int, rank: int) -> None:
    """Seed all generators; ranks get different streams."""
    random.seed(f"{seed} {rank}")
    np.random.seed([seed % 2**32, rank])
    torch.manual_seed(seed * 10007 + rank)


def set_batch_norm(model: nn.Module, mode: str, ranks: Ranks) -> nn.Module:
    """Let batch norms use each rank's statistics, all ranks' together, or the stored ones."""
    if mode == "sync" and ranks.size > 1:
        if ranks.device.type != "cuda":
            raise UserError("run.batch_norm sync needs GPUs (torch's SyncBatchNorm): pass frozen or local")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def set_training(model: nn.Module, batch_norm: str) -> None:
    """Switch to training mode, but for frozen modules, and batch norms whose statistics are to stay as they are."""
    model.train()
    for module in model.modules():
        if is_frozen(module):
            module.eval()
    if batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
