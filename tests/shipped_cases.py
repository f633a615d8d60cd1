"""Stand-ins for weights that ship, trained in seconds, and what must hold for every file that ships."""

import hashlib
import json
import re

import numpy as np
import torch
from PIL import Image

import fast.pretrained
from train.classify import main as classify
from train.common.errors import run_command
from train.data.masks import encode
from train.export import MOST_BYTES, MOST_SAMPLE_BYTES, UNWRITTEN
from train.export import main as export
from train.models.pretrained import read_header
from train.release.card import SECTIONS
from train.release.scores import evaluate_samples, samples_of
from train.segment import main as segment

MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|tmp|mnt|data|Users|workspace)/|[A-Z]:\\\\")
TOLERANCE = 1.0  # percent: another CPU adds in another order, and may rank a token or an object otherwise
ABOUT = """
title: a stand-in
summary: It finds squares.
data: Squares.
split: 4 validation pictures
licence: CC0
recipe: Seconds on a CPU.
command: |
  python -m train.classify
  python -m train.segment
limits: Everything but squares.
"""


def squares(root):
    """Write a COCO tree of one bright square a picture: 20 pictures to train on, 4 to evaluator."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        (root / split).mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
        for number in range(1, count + 1):
            picture, mask = np.full((48, 48, 3), 20, np.uint8), np.zeros((48, 48), bool)
            top, left = generator.integers(0, 24, 2).tolist()
            mask[top : top + 24, left : left + 24] = True
            picture[mask] = 230
            Image.fromarray(picture).save(root / split / f"p{number}.png")
            image = {"id": number, "file_name": f"p{number}.png", "width": 48, "height": 48}
            content["images"].append(image)
            shape = {"bbox": [left, top, 24, 24], "area": 576, "segmentation": encode(mask), "iscrowd": 0}
            content["annotations"].append({"id": number, "image_id": number, "category_id": 1, **shape})
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def train_stand_ins(root):
    """Train a classifier of digits, a panoptic segmenter of them and one of squares; return checkpoints by name."""
    threads, data = torch.get_num_threads(), squares(root / "squares")
    short = ["--schedule.max_steps", "80", "--run.eval_every", "80", "--optim.lr", "5e-3", "--data.resize", "none"]
    tasks = ["--data.task", "instance", "--evaluator.tasks", "[instance]"]
    runs = {
        "digits": (classify, ["--config", "digits_smoke"]),
        "scattered": (segment, ["--config", "digits_panoptic_smoke", "--run.ema", "0.5"]),
        "squares": (segment, ["--config", "digits_panoptic_smoke", "--data", str(data), *tasks, *short]),
    }
    for name, (main, arguments) in runs.items():
        assert run_command(main, [*arguments, "--run.output", str(root / name)]) == 0
    torch.set_num_threads(threads)
    return {name: root / name / "best.pt" for name in runs}


def export_stand_in(checkpoint, name, out, *arguments):
    """Export a checkpoint with the stand-in's card; return the exit code."""
    about = out.parent / "about.yaml"
    about.write_text(ABOUT)
    return run_command(export, [str(checkpoint), name, "--about", str(about), "--out", str(out), *arguments])


def check_shipped(name):
    """Assert all that must hold for a file that ships in ``fast.pretrained.FOLDER``."""
    path = fast.pretrained.pretrained_file(name)
    data, facts, card = path.read_bytes(), read_header(path), path.with_suffix(".md").read_text(encoding="utf-8")
    assert len(data) <= MOST_BYTES
    parts = dict(part.split("\n", 1) for part in card.split("\n## ")[1:])
    assert set(parts) == set(SECTIONS) and all(text.strip() for text in parts.values())
    assert hashlib.sha256(data).hexdigest() in parts["File"] and f"{facts['parameters']:,} parameters" in parts["File"]
    weights = fast.pretrained.load_pretrained(name)[0]
    assert all(weight.dtype in (torch.float32, torch.int64) for weight in weights.values())
    pictures = list(samples_of(path).glob("*"))
    assert sum(each.stat().st_size for each in pictures) <= MOST_SAMPLE_BYTES
    sums = fast.pretrained._sums()
    assert {each.relative_to(path.parent).as_posix() for each in pictures} <= set(sums)
    for text in (card, json.dumps(facts)):
        assert UNWRITTEN not in text and not MACHINE_PATH.search(text)
    expected = facts["samples"]["scores"]
    assert facts["samples"]["pictures"] and expected
    found = evaluate_samples(path)
    for key, score in expected.items():
        assert score is None or abs(found[key] - score) <= TOLERANCE, (key, found[key], score)
        shown = f"{score:.2f}" if isinstance(score, float) else ""
        assert shown in parts["Scores"], key
