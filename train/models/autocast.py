"""The precision that networks run at."""

import torch

from ..common.distributed import Ranks
from ..config.classification import Config


def autocast(config: Config, ranks: Ranks):
    """Return the context in which the network runs at the config's precision."""
    kind = torch.float16 if config.run.amp == "fp16" else torch.bfloat16
    return torch.autocast(ranks.device.type, dtype=kind, enabled=config.run.amp != "off")
