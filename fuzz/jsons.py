"""Odd data sets, made by changing the structure of their jsons: ``python -m fuzz.jsons --seconds 60``.

Every json of COCO's two forms and of labelme's, and every classes.json, must open, and each of its pictures be read as
a whole sample, or be refused by one UserError of one line that can be printed, within 5 seconds of processor time and
1 GB. What fails is kept in a folder, to be read again by ``--replay FILE``. Cases are a function of (seed, number).
"""

import argparse
import faulthandler
import io
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

SECONDS, BYTES = 5.0, 1 << 30
LARGEST = 1 << 19  # bytes of a file: reading takes as long as the file is large
HEIGHT, WIDTH = 12, 16
ODD = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**53, 2**63, 2**64, 10**40, 10**400),
    *(0.5, 1.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "1", "-1", "true", "a", "é", "\u0661", "\0", "\ud800", "\n", "a" * 5000, "o" * 3000),
    *("../a", "/dev/zero", ".", "a.png", "#ff6600", "rgb(1,2)", "hsl(1,2%,9999999999999%)"),
    *([], {}, [[]], [None], [1], [1.5, 2], [[1, 2, 3, 4, 5, 6]], {"id": 1}),
    *({"size": [HEIGHT, WIDTH], "counts": "o"}, {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}),
    {"size": [10**9, 10**9], "counts": [10**18]},
)
KEYS = (
    *("id", "image_id", "category_id", "file_name", "height", "width", "name", "isthing", "color", "iscrowd", "area"),
    *("bbox", "segmentation", "segments_info", "size", "counts", "images", "annotations", "categories"),
    *("names", "things", "ignore", "", "01", "1e1"),
    *("shapes", "label", "points", "group_id", "shape_type", "imagePath", "imageHeight", "imageWidth"),
)


def write_tree(root: Path) -> None:
    """Write the pictures and masks that the jsons name."""
    for folder in ("images", "masks", "a", "labelme/train"):
        (root / folder).mkdir(parents=True)
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ids[3:9, 4:8], ids[3:9, 8:12] = 1, 7
    for name in ("a", "b"):
        picture = np.random.default_rng(ord(name)).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for folder in ("images", "labelme/train"):
            Image.fromarray(picture).save(root / folder / f"{name}.png")
        Image.fromarray(ids).save(root / "masks" / f"{name}.png")
        Image.fromarray(np.dstack([ids, 0 * ids, 0 * ids])).save(root / "a" / f"{name}.png")


def seeds() -> dict[str, dict]:
    """Return a valid json of each form, by file name."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[3:9, 4:8] = 1
    packed = {"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(mask)["counts"].decode()}
    shapes = [[[4, 3, 8, 3, 8, 9, 4, 9]], packed, {"size": [HEIGHT, WIDTH], "counts": [51, 6, 135]}]
    images = [{"id": i, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for i, n in enumerate("ab", 1)]
    categories = [{"id": 1, "name": "bolt", "color": [1, 2, 3]}, {"id": 7, "name": "ground", "isthing": 0}]
    objects = [
        {"id": i, "image_id": 1 + i % 2, "category_id": 1, "iscrowd": i // 4, "area": 24, "segmentation": shapes[i % 3]}
        for i in range(6)
    ]
    segments = [{"id": 1, "category_id": 1, "iscrowd": 0}, {"id": 7, "category_id": 7}]
    maps = [{"image_id": i, "file_name": f"{n}.png", "segments_info": segments} for i, n in enumerate("ab", 1)]
    outlines = {"polygon": [[4, 3], [8, 3], [8, 9]], "rectangle": [[1, 1], [3, 5]], "circle": [[9, 6], [12.5, 6]]}
    drawn = [
        {"label": n, "points": points, "group_id": g, "shape_type": kind, "flags": {}}
        for (kind, points), n, g in zip(outlines.items(), ("bolt", "nut", "bolt"), (None, 1, None), strict=True)
    ]
    shared = {"images": images, "categories": categories}
    return {
        "objects.json": shared | {"annotations": objects},
        "a.json": shared | {"annotations": maps},
        "labelme/train/a.json": {
            "version": "5.5.0",
            "flags": {},
            "imagePath": "a.png",
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
            "imageData": None,
            "shapes": drawn,
        },
        "classes.json": {"names": {"0": "ground", "1": "bolt", "7": "nut"}, "things": ["bolt"], "ignore": [255]},
    }


def make(seed: int, number: int) -> tuple[str, bytes]:
    """Create a file: return its name and content."""
    draw = random.Random(f"{seed} {number}")
    name, content = draw.choice(list(seeds().items()))
    content = json.loads(json.dumps(content))
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        changed = change(draw, json.loads(json.dumps(content)))
        content = changed if len(json.dumps(changed)) < LARGEST else content
    data = json.dumps(content, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")
    spoilt = draw.random()
    if spoilt < 0.05:
        place = draw.randrange(len(data))
        data = (
            data[:place]
            + bytes([draw.randrange(256)]) * draw.choice([0, 1, 9])
            + data[place + draw.choice([0, 1, 99]) :]
        )
    elif spoilt < 0.07:
        data = draw.choice(
            [b"\xef\xbb\xbf" + data, data.decode("utf-8", "replace").encode("utf-16"), b"[" * 90000, b""]
        )
    return name, data


def places(content) -> list[tuple]:
    """List all (container, key) of a nested content, the content itself in a list of one."""
    found, waiting = [], [([content], 0)]
    while waiting:
        container, key = waiting.pop()
        found.append((container, key))
        inner = container[key]
        if isinstance(inner, dict | list):
            waiting += [(inner, each) for each in (inner if isinstance(inner, dict) else range(len(inner)))]
    return found


def change(draw: random.Random, content):
    """Change one place of a content in one way."""
    root = [content]
    found = [(root, 0), *places(content)[1:]]
    container, key = draw.choice(found)
    value = container[key]
    way = draw.choice(["odd", "odd", "drop", "other", "twice", "rename", "wrap", "retype", "many", "deep"])
    if way == "odd":
        container[key] = json.loads(json.dumps(draw.choice(ODD)))
    elif way == "drop" and container is not root:
        del container[key]
    elif way == "other":
        donor, place = draw.choice(found)
        container[key] = json.loads(json.dumps(donor[place]))
    elif way == "twice" and isinstance(container, list) and container is not root:
        container.insert(draw.randrange(len(container) + 1), json.loads(json.dumps(value)))
    elif way == "rename" and isinstance(container, dict):
        container[draw.choice(KEYS)] = container.pop(key)
    elif way == "wrap":
        container[key] = draw.choice([[value], {draw.choice(KEYS): value}, [value, value]])
    elif way == "retype":
        number = isinstance(value, int | float)
        container[key] = draw.choice(
            [str(value), -value if number else [], value * 10**9 if number else {}, value == 1]
        )
    elif way == "many" and isinstance(value, list):
        container[key] = value * draw.choice([2, 50, 1000])
    elif way == "deep":
        for _ in range(draw.choice([3, 20, 60])):
            value = draw.choice([[value], {"id": value}])
        container[key] = value
    return root[0]


def use(root: Path, name: str) -> str:
    """Open what a file describes, read every picture and describe it all: return "refused" or "read"."""
    from train.check_data import main
    from train.common.errors import UserError
    from train.data.formats import open_source
    from train.data.segmentation import pack_vocabulary, unpack_vocabulary

    output, outcome = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), "read"
    path = {"classes.json": root, "labelme/train/a.json": root / "labelme"}.get(name, root / name)
    sys.stdout, stdout = output, sys.stdout
    try:
        main([str(path)])
    except UserError as error:
        return refusal(error)
    finally:
        sys.stdout = stdout
    for skip_empty in (False, True):
        try:
            source = open_source(path, "train", skip_empty=skip_empty)
        except UserError as error:
            outcome = refusal(error)
            continue
        assert len(source) and unpack_vocabulary(pack_vocabulary(source.vocabulary)) == source.vocabulary
        for index in range(min(len(source), 4)):
            try:
                check(source.load(index), source.vocabulary.num_classes)
            except UserError as error:
                outcome = refusal(error)
    return outcome


def refusal(error: Exception) -> str:
    """Check that an error is one line that can be printed."""
    text = str(error)
    text.encode()
    assert text.strip() and "\n" not in text and len(text) < 3_000, f"its message is {text[:200]!r}"
    return "refused"


def check(sample, classes: int) -> None:
    """Check that a sample is whole."""
    shape, count = sample.image.shape[:2], len(sample.labels)
    assert sample.image.dtype == np.uint8 and sample.image.shape == (*shape, 3)
    assert sample.masks.dtype == bool and sample.masks.shape == (count, *shape)
    assert sample.crowd.dtype == bool and sample.crowd.shape == (count,) and sample.ignore.shape == shape
    assert count == 0 or 0 <= sample.labels.min() <= sample.labels.max() < classes


def run(root: Path, name: str, data: bytes) -> str:
    """Use one file within the limits: return "read", "refused" or what is wrong."""
    for other in seeds():
        (root / other).unlink(missing_ok=True)
    (root / name).write_bytes(data)
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
    before, start = peak(), time.process_time()
    try:
        outcome = use(root, name)
    except Exception:
        outcome = traceback.format_exc()
    faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.process_time() - start, peak() - before
    if seconds > SECONDS or grown > BYTES:
        return f"{seconds:.1f} seconds and {grown / 2**20:.0f} MiB\n{outcome}"
    return outcome


def peak() -> int:
    """Return the largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Run cases until the time is over: return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.jsons", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="outputs/fuzz-jsons", help="folder for files that failed")
    parser.add_argument("--replay", help="a kept file, NUMBER-NAME")
    options = parser.parse_args()
    counts, failed, end = {"read": 0, "refused": 0}, 0, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tree(root)
        (root / "classes.json").write_text(json.dumps(seeds()["classes.json"]))
        use(root, "classes.json")  # what is imported at first does not count
        if options.replay:
            path = Path(options.replay)
            outcome = run(root, path.name.partition("-")[2].replace("_", "/"), path.read_bytes())
            print(outcome)
            return int(outcome not in counts)
        for name, content in seeds().items():
            outcome = run(root, name, json.dumps(content).encode())
            assert outcome == "read", f"{name}, which is in order: {outcome}"
        number = 0
        while time.monotonic() < end:
            name, data = make(options.seed, number)
            outcome = run(root, name, data)
            if outcome in counts:
                counts[outcome] += 1
            else:
                failed += 1
                kept = Path(options.keep) / f"{number}-{name.replace('/', '_')}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(data)
                print(f"FAILED {kept}:\n{outcome}", file=sys.stderr)
            number += 1
    shown = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
    print(f"{number:,} files of seed {options.seed}: {shown}, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
