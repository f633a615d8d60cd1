"""Write a trained classifier or segmenter as an ONNX file, for onnxruntime and others: one image size, any batch.

    python -m train.export_onnx digits                                 # weights that ship: writes digits.onnx
    python -m train.export_onnx outputs/digits_nano/best.pt --out classifier.onnx
    python -m train.export_onnx nuclei --features --size 128 128         # the backbone: four stages' tokens

The file says in its metadata its kind, classes, input_size, and the mean and std by which pictures in 0..1 are
normalised. Nothing is written over a file that is not as we wrote it. Needs the packages of the extra "onnx".
"""

import sys
import time
from pathlib import Path

from torch import nn

import fast
from fast.onnx_export import OPSET, export_onnx, kind_of
from fast.pretrained import backbone_weights

from .common.errors import Parser, UserError, one_line, run_command
from .common.output_files import Outputs
from .config.loader import override
from .data.digits import CLASSES
from .data.normalization import MEAN, STD
from .models.checkpoint import KIND, SEGMENTER, TRAINED, naming, read_file
from .models.pretrained import resolve
from .models.weights import kind_of as kind_of_file
from .models.weights import known_classes
from .release.scores import CONFIGS, open_model

NEEDS = {KIND: TRAINED, SEGMENTER: (*TRAINED, "vocabulary", "task")}


def open_checkpoint(path: str) -> tuple[nn.Module, list[str] | None, tuple[int, int]]:
    """Create the network of a checkpoint: itself, its classes if they are known, the size that it was trained with.

    Raises
    ------
    UserError
        No such file, or none of ours.
    """
    kind = kind_of_file(path)
    if kind not in CONFIGS:
        raise UserError(f"{path} is no checkpoint of train.classify or train.segment")
    state = read_file(Path(path), kind, NEEDS[kind])
    with naming(path):
        config = override(state["config"], [], CONFIGS[kind])
        model = open_model(state, config, path)
    classes = known_classes(state) or (list(CLASSES) if config.data.source == "digits" else None)
    return model, classes, (config.data.size,) * 2 if kind == KIND else tuple(config.data.crop)


def features_of(model: nn.Module) -> nn.Module:
    """Return the feature extractor in a network: a segmenter's backbone, of a classifier one with fresh norms."""
    if kind_of(model) == "segmenter":
        return model.backbone
    backbone = fast.AutoFocusFormer(model.config, features_only=True)
    backbone.load_state_dict(backbone_weights(model.state_dict(), backbone))
    return backbone


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.export_onnx", __doc__)
    parser.add_argument("weights", help="file of train.classify or train.segment, or a name of fast.list_pretrained()")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; default: as it was trained")
    parser.add_argument("--features", action="store_true", help="the backbone alone: each stage's positions, features")
    parser.add_argument("--positions", action="store_true", help="also return the positions of each stage's tokens")
    parser.add_argument("--out", help="file to write; default: NAME.onnx here")
    options = parser.parse_args(arguments)
    checkpoint = resolve(options.weights)
    out = Path(options.out or f"{Path(checkpoint).stem}.onnx")
    outputs = Outputs(out.parent, [Path(checkpoint)])
    outputs.check([out.name])
    model, classes, size = open_checkpoint(checkpoint)
    model, size = features_of(model) if options.features else model, tuple(options.size or size)
    start = time.perf_counter()
    try:
        data = export_onnx(model, size, None if options.features else classes, MEAN, STD, options.positions)
    except (ValueError, ImportError) as error:
        raise UserError(one_line(error)) from error
    outputs.write(out.name, data)
    seconds = time.perf_counter() - start
    print(
        f"wrote {out} ({len(data):,} bytes, opset {OPSET}) in {seconds:.0f} s: {kind_of(model)}, {size[0]} x {size[1]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
