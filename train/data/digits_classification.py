"""Scattered Digits as a data set of one digit a picture."""

import numpy as np

from ..common.errors import UserError, one_line
from ..config.classification import Config


class Digits:
    """Scattered Digits as a source; training pictures are new in every epoch.

    Parameters
    ----------
    config : Config
    split : str
        "train" or "val".
    """

    def __init__(self, config: Config, split: str):
        from .digits import DigitsConfig, ScatteredDigits

        data, epochs = config.data, config.schedule.epochs if split == "train" else 1
        self.split, self.length, self.num_classes = split, getattr(data, f"{split}_length"), 10
        self.first_epochs = data.first_epochs if split == "train" else 0
        try:
            looks = [DigitsConfig(**look) for look in (data.digits, data.digits | data.digits_first)]
            length, seed = self.length * epochs, config.run.seed
            self.pictures = ScatteredDigits(looks[0], split, length, seed)
            self.first_pictures = ScatteredDigits(looks[1], split, length, seed) if self.first_epochs else None
        except (TypeError, ValueError) as error:
            raise UserError(f"data.digits: {one_line(error)}") from error

    def __len__(self):
        return self.length

    def name(self, index: int) -> str:
        """Return a name for a picture that is nowhere on disk."""
        return f"digits/{self.split}/{index}"

    def load(self, index: int, epoch: int = 0):
        """Render a picture: (RGB picture, digit)."""
        pictures = self.first_pictures if epoch < self.first_epochs else self.pictures
        return pictures[epoch * self.length + index]

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the pictures, (n,) int64."""
        return generator.permutation(len(self))
