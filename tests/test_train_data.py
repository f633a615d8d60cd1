"""Folders and shards hold the same samples; bad images are named, counted and survived."""

import io
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config.loader import load_config
from train.data.classification import check_classes, open_samples
from train.data.loader import BadImages, load
from train.data.sampler import EpochSampler, EvalSampler
from train.data.shards import Shards, expand, most_names
from train.metrics.classification import evaluate

# Loader processes are forked from a process that has threads; Python 3.12 warns of that, as torch's default does it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def picture(number):
    """Make a small picture that differs from every other."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def make_folders(root, classes=3, each=4):
    for split in ("train", "val"):
        for number in range(classes * each):
            folder = root / split / f"class{number % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03}.jpg").write_bytes(picture(number))
    return root


def make_shards(root, samples, each=5):
    (root / "val").mkdir(parents=True)
    (root / "train").mkdir()
    for split in ("train", "val"):
        for first in range(0, len(samples), each):
            with webdataset.TarWriter(str(root / split / f"{first:03}.tar")) as writer:
                for number, (path, label) in enumerate(samples[first : first + each], start=first):
                    with open(path, "rb") as file:
                        writer.write({"__key__": f"sample{number:03}", "jpg": file.read(), "cls": label})
    return root


def config_for(path, *more):
    fixed = ["--model.num_classes", "3", "--run.total_batch", "4", "--run.batch_size", "4", "--data.workers", "0"]
    augment = ["--augment.randaugment", "rand-m9-mstd0.5-inc1", "--augment.erasing", "0.25", "--augment.flip", "0.5"]
    return load_config("digits_smoke", ["--data", str(path), *fixed, *augment, *more])


def train_batches(config, epoch=0, start=0):
    samples = open_samples(config, "train")
    return list(load(samples, EpochSampler(samples, config, Ranks("cpu"), epoch, start), config, cuda=False))


def test_shards_hold_what_folders_hold(tmp_path):
    folders = open_samples(config_for(make_folders(tmp_path / "a")), "val")
    shards = open_samples(config_for(make_shards(tmp_path / "b", folders.source.samples)), "val")
    assert len(folders) == len(shards) == 12
    for index in range(12):
        one, other = folders[0, index], shards[0, index]
        assert one.label == other.label
        assert torch.equal(one.image, other.image)


def test_shards_on_two_disks_by_braces(tmp_path):
    samples = open_samples(config_for(make_folders(tmp_path / "a")), "val").source.samples
    make_shards(tmp_path / "disk1", samples[:6], each=3)
    make_shards(tmp_path / "disk2", samples[6:], each=3)
    config = config_for(f"{tmp_path}/disk1,{tmp_path}/disk2")
    by_folder = open_samples(config, "val").source
    config.data.val = [f"{tmp_path}/disk{{1..2}}/val/{{000,003}}.tar"]
    by_pattern = open_samples(config, "val").source
    assert by_folder.paths == by_pattern.paths
    assert [by_folder.load(i)[1] for i in range(12)] == [label for _, label in samples]


def test_shard_order_stays_within_blocks(tmp_path):
    samples = open_samples(config_for(make_folders(tmp_path / "a", each=10)), "val").source.samples
    config = config_for(make_shards(tmp_path / "b", samples), "--data.shuffle_block", "2")
    shards = open_samples(config, "train").source
    order = shards.order(np.random.default_rng(0))
    assert sorted(order) == list(range(30))
    assert [len({shards.shard_of(i) for i in order[first : first + 10]}) for first in (0, 10, 20)] == [2, 2, 2]


def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path):
    config = config_for(make_folders(tmp_path))
    samples = open_samples(config, "train")
    np.random.seed(5)
    state = torch.get_rng_state()
    first = samples[1, 7]
    assert torch.equal(torch.get_rng_state(), state)
    samples[1, 3]
    torch.rand(9)
    assert torch.equal(first.image, samples[1, 7].image)
    assert not torch.equal(first.image, samples[2, 7].image)


def test_batches_do_not_depend_on_workers_or_resuming(tmp_path):
    config = config_for(make_folders(tmp_path))
    alone = train_batches(config)
    config.data.workers = 2
    helped = train_batches(config, start=1)
    assert len(alone) == 3
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone[1:], helped, strict=True))
    assert sum((batch.asked for batch in alone), []) != sum((b.asked for b in train_batches(config, epoch=1)), [])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_bad_image_is_skipped_named_and_counted(tmp_path, damage):
    config = config_for(make_folders(tmp_path))
    bad = tmp_path / "train" / "class1" / "004.jpg"
    content = bad.read_bytes()
    bad.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\xff\xd8 no image", "empty": b""}[damage])
    samples, lines = open_samples(config, "train"), []
    note = BadImages(samples)
    for batch in train_batches(config):
        assert batch.images.shape == (4, 3, 32, 32)
        lines += note.note(batch)
    (line,) = lines
    reason = {"truncated": "truncated", "garbage": "cannot identify", "empty": "cannot identify"}[damage]
    assert line.startswith(f"skipped unreadable image (1 so far): cannot read image {bad}: ") and reason in line


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_can_stop_the_run(tmp_path, workers):
    config = config_for(make_folders(tmp_path), "--data.on_bad_image", "stop", "--data.workers", str(workers))
    (tmp_path / "train" / "class1" / "004.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read image .*004.jpg.*on_bad_image skip") as caught:
        train_batches(config)
    assert "\n" not in str(caught.value)


def test_all_images_bad_ends_with_an_error(tmp_path):
    config = config_for(make_folders(tmp_path))
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read image"):
        train_batches(config)


def test_evaluation_counts_each_readable_image_once(tmp_path):
    config = config_for(make_folders(tmp_path), "--run.batch_size", "8")
    (tmp_path / "val" / "class1" / "004.jpg").write_bytes(b"no image")
    seen = []

    class Net(torch.nn.Module):
        def forward(self, images):
            seen.append(len(images))
            return torch.tensor([[1.0, 0, 0]]).expand(len(images), 3)

    result = evaluate(Net(), open_samples(config, "val"), config, Ranks("cpu"), say=lambda line: None)
    assert (result["images"], result["bad_images"]) == (11, 1)
    assert result["top1"] == pytest.approx(4 / 11)
    assert result["top5"] == 1
    assert seen == [8, 4]


def test_ranks_share_out_an_epoch_and_an_evaluation():
    config = load_config("digits_smoke", ["--run.batch_size", "4"])
    samples, ranks = open_samples(config, "train"), [Ranks("cpu"), Ranks("cpu")]
    for number, rank in enumerate(ranks):
        rank.rank, rank.size = number, 2
    parts = [list(EpochSampler(samples, config, rank, 0, 0)) for rank in ranks]
    whole = list(EpochSampler(samples, load_config("digits_smoke"), Ranks("cpu"), 0, 0))
    joined = [parts[0][2 * t] + parts[0][2 * t + 1] + parts[1][2 * t] + parts[1][2 * t + 1] for t in range(4)]
    assert joined == whole
    mine = [[key for batch in EvalSampler(samples, 5, rank) for key in batch] for rank in ranks]
    assert sorted(mine[0] + mine[1]) == [(0, index) for index in range(64)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train" / "class9").mkdir(), "train/class9 has no images"),
        (lambda root: (root / "val").rename(root / "test"), "no folder .*val: expected train/ and val/"),
        (lambda root: (root / "val" / "class0").rename(root / "gone"), "the val images have 2 classes"),
    ],
)
def test_wrong_layout_is_named(tmp_path, change, message):
    change(make_folders(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        for split in ("train", "val"):
            open_samples(config_for(tmp_path), split)
    assert "\n" not in str(caught.value)


def test_class_folders_of_other_names_are_refused(tmp_path):
    config = config_for(make_folders(tmp_path))
    (tmp_path / "val" / "class2").rename(tmp_path / "val" / "klass2")
    with pytest.raises(UserError, match="class folder class2 is in train/ but not val/"):
        check_classes(open_samples(config, "train").source, open_samples(config, "val").source)


def test_truncated_shard_and_missing_label_are_named(tmp_path):
    samples = open_samples(config_for(make_folders(tmp_path / "a")), "val").source.samples
    shards = make_shards(tmp_path / "b", samples)
    path = shards / "train" / "000.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match="shard .*000.tar"):
        open_samples(config_for(shards), "train")
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "lonely", "jpg": picture(0)})
    with pytest.raises(UserError, match="lonely lacks its image or its .cls"):
        open_samples(config_for(shards), "train")


def test_no_images_at_all_says_what_is_expected():
    with pytest.raises(UserError, match="pass --data PATH"):
        open_samples(load_config("imagenet_mini"), "train")


def test_the_first_epochs_may_train_on_easier_digits_and_validation_never_does():
    more = ["--data.first_epochs", "1", "--data.digits_first", "{background: 0, noise: 0}"]
    config = load_config("digits_smoke", more)
    first, later = (np.asarray(open_samples(config, "train").source.load(7, epoch)[0]) for epoch in (0, 1))
    grey = first[..., :1] == first
    assert grey.all() and len(np.unique(first)) < len(np.unique(later))  # flat grey, then a photograph with noise
    plain = open_samples(load_config("digits_smoke"), "val").source.load(7)[0]
    assert (np.asarray(open_samples(config, "val").source.load(7)[0]) == np.asarray(plain)).all()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/train-{{000..999999999}}.tar", "stands for more than 100,000 files"),
        ("{}/{{0..9999}}{{0..9999}}{{0..9999}}.tar", "stands for more than 100,000 files"),
        ("{}/" + "{{" + "{{a,b}}" * 40 + ",c}}", "stands for more than 100,000 files"),
        ("{}/train-{{000..127.tar", "write such as train-{000..127}.tar"),
    ],
)
def test_patterns_of_too_many_shards_and_odd_braces_are_refused(tmp_path, pattern, message):
    with pytest.raises(UserError, match=re.escape(message)):
        expand([pattern.format(tmp_path)])


def test_a_pattern_s_names_are_counted_before_they_are_made():
    assert [most_names(each) for each in ("a.tar", "{0..9}{a,b}", "{09..0..3}", "{a,b,{1..5}}")] == [1, 20, 4, 15]


def sparse(archive):
    """Add a sparse image in GNU's old form: a header whose type says so."""
    member = tarfile.TarInfo("a.jpg")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
    archive.addfile(member)


def member(name, content):
    """Make a function that adds a file."""

    def add(archive):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))

    return add


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([sparse, member("a.cls", b"0")], "a.jpg is a sparse file"),
        ([member("a.jpg", b"1"), member("a.jpg", b"2"), member("a.cls", b"0")], "a.jpg is there twice"),
        ([member("a.jpg", b"1"), member("a.png", b"2"), member("a.cls", b"0")], "a.png is there twice"),
        ([member("a.jpg", b"1"), member("a.cls", b"9" * 30)], "not the number of a class"),
        ([member("a.jpg", b"1"), member("a.cls", b"-1")], "holds b'-1', not the number of a class"),
        ([member("a.jpg", b"1"), member("a.cls", "é".encode("latin-1"))], "not the number of a class"),
    ],
)
def test_odd_shards_are_refused(tmp_path, members, message):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for add in members:
            add(archive)
    with pytest.raises(UserError, match=message):
        Shards([str(tmp_path / "a.tar")], 1, 10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_python_ends_with_loader_processes_left_over(tmp_path):
    """A generator that something still holds when Python ends, as a traceback does, keeps nobody waiting."""
    make_folders(tmp_path)
    script = (
        "import sys; from tests.test_train_data import *\n"
        f"config = config_for({str(tmp_path)!r}, '--data.workers', '2'); samples = open_samples(config, 'train')\n"
        "batches = load(samples, EpochSampler(samples, config, Ranks('cpu'), 0, 0), config, cuda=False)\n"
        "next(batches); sys.kept = batches\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
