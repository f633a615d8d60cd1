"""The context in which a network runs: its precision, and its refusals in one line."""

import torch

from ..common.distributed import Ranks
from ..common.errors import UserError, one_line
from ..config.section import Section


class Autocast(torch.autocast):
    """torch.autocast in which a ValueError of the network, as of a rate too small for a picture, is a UserError."""

    def __exit__(self, kind, error, traceback):
        super().__exit__(kind, error, traceback)
        if isinstance(error, ValueError) and not isinstance(error, UserError):
            raise UserError(f"model: {one_line(error)}") from error


def autocast(config: Section, ranks: Ranks):
    """Return the context in which the network runs at the config's precision."""
    kind = torch.float16 if config.run.amp == "fp16" else torch.bfloat16
    return Autocast(ranks.device.type, dtype=kind, enabled=config.run.amp != "off")
