"""What a row of ``train.ablate`` is: its config, what is taken out of the network, and its trainings."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from fast.attention import Attention

from ..config import classification as base
from ..config import segmentation
from ..config.section import CONFIGS, Section
from ..models.segmenter import load_backbone
from ..tasks.classification import Classification
from ..tasks.segmentation import Segmentation
from .pictures import Shared, open_digits, open_images, remember

OFFSETS = 2  # dx and dy are the first of a relative position's five numbers
FAR_ABOVE = 100.0  # e^-100 is 0 beside any float32 weight of a neighbour


class Row(Section):
    """What a row of the table changes."""

    backbone: dict[str, Any] = Field({}, description="fields of the backbone's Config, such as alpha: 8")
    after_classifier: bool = Field(False, description="the classifier trains without the change of the backbone")
    without: list[Literal["expanded_position", "blank_token"]] = Field([], description="what is taken out")
    overrides: dict[str, Any] = Field({}, description="keys of the segmenter's training, such as optim.lr: 1.0e-3")


class Table(Section):
    """What is compared."""

    classify: dict[str, Any] | None = Field(
        None, description="fields of train.classify's Config: the backbone's first training; null: there is none"
    )
    one_class: bool = Field(True, description="the segmenter says where digits are, not which")
    rows: dict[str, Row] = Field({"full": Row()}, description="by name; the others are compared with the first")


class Config(segmentation.Config):
    """A training like those of train.segment, and the rows that vary it."""

    folder: ClassVar[Path] = CONFIGS / "ablate"

    table: Table = Table()


class OnlyOffsets(nn.Module):
    """Weights of a position term (H, 5) with 0 for all but dx and dy."""

    def forward(self, weight):
        """(H, 5) -> (H, 5)."""
        return nn.functional.pad(weight[:, :OFFSETS], (0, weight.shape[1] - OFFSETS))


class Shifted(nn.Module):
    """Every number greater by FAR_ABOVE."""

    def forward(self, bias):
        """Any shape, kept."""
        return bias + FAR_ABOVE


class Zero(nn.Module):
    """Every number replaced by 0."""

    def forward(self, key):
        """Any shape, kept."""
        return key * 0


def take_out(model: nn.Module, without: list[str]) -> nn.Module:
    """Take ideas out of every attention of a network, through its parameters.

    ``expanded_position``: the position term P of Eq. 2 reads only (dx, dy), not distance, sine and cosine (Eq. 5).
    ``blank_token``: the blank's logit becomes 0 and all others grow by FAR_ABOVE, which a softmax cannot tell from a
    blank's logit of minus that: its weight vanishes (Eq. 2 without sec. 4.3).

    Parameters
    ----------
    model : Module
        Any that holds ``fast``'s attention; changed in place, its parameters renamed as parametrizations are.
    without : list of str

    Returns
    -------
    Module
        The same.
    """
    for attention in [module for module in model.modules() if isinstance(module, Attention)]:
        if "expanded_position" in without:
            register_parametrization(attention.position, "weight", OnlyOffsets())
        if "blank_token" in without:
            register_parametrization(attention.position, "bias", Shifted())
            register_parametrization(attention, "blank_key", Zero())
    return model


class AblatedClassification(Classification):
    """Classification by a network without something.

    Parameters
    ----------
    config : train.config.classification.Config
    without : list of str
        As ``take_out`` takes it.
    shared : Shared
    """

    def __init__(self, config: base.Config, without: list[str], shared: Shared):
        super().__init__(config)
        self.without, self.shared = without, shared

    def datasets(self):
        """Open the pictures, or take those of the row before."""
        opened = super().datasets
        return self.shared.open(self.config, lambda: remember(opened()))

    def model(self, train_set) -> nn.Module:
        """Create the config's network, then take out what it is to do without."""
        return take_out(super().model(train_set), self.without)


class AblatedSegmentation(Segmentation):
    """Segmentation by a network without something, from a backbone that was trained without it too.

    Parameters
    ----------
    config : Config
    without : list of str
        As ``take_out`` takes it.
    shared : Shared
    backbone : Path or None
        Checkpoint of an ``AblatedClassification``; None: the backbone starts from fresh weights.
    """

    def __init__(self, config: Config, without: list[str], shared: Shared, backbone: Path | None):
        super().__init__(config)
        self.without, self.shared, self.backbone = without, shared, backbone

    def datasets(self):
        """Open the pictures, or take those of the row before."""
        config, opened = self.config, open_images
        if config.data.source == "digits":
            opened = partial(open_digits, one_class=config.table.one_class)
        sets = self.shared.open(config, lambda: opened(config))
        config.model.num_classes = sets[0].source.vocabulary.num_classes
        return sets

    def model(self, train_set) -> nn.Module:
        """Create the config's segmenter, take out what it is to do without, and fill the backbone."""
        model = take_out(super().model(train_set), self.without)
        if self.backbone:
            load_backbone(model, str(self.backbone))
        return model
