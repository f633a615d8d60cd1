"""AutoFocusFormer in PyTorch: the twin of ``reference``, batched, differentiable, on any device.

It needs torch and numpy alone, and can be copied into another project as it is:

    model = fast.create_model("aff_mini", num_classes=10)
    logits = model(images)                                          # (B, 3, H, W) -> (B, 10)
    features, stages = model.forward_features(images, return_stages=True)
    segmenter = fast.create_segmenter(pretrained="nuclei")          # of list_pretrained(): in fast/weights, no network
"""

from . import checkpoints
from .backbone import AutoFocusFormer, Config, StageTokens, TokenSet
from .mask2former import HeadConfig
from .models import create_model, create_segmenter, list_models, model_config
from .pretrained import list_pretrained, pretrained_facts
from .segmenter import SegmenterOutput, pad_images

__all__ = [
    "AutoFocusFormer",
    "Config",
    "HeadConfig",
    "SegmenterOutput",
    "StageTokens",
    "TokenSet",
    "checkpoints",
    "create_model",
    "create_segmenter",
    "list_models",
    "list_pretrained",
    "model_config",
    "pad_images",
    "pretrained_facts",
]
