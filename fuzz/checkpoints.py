"""Hostile checkpoints, made by changing their structure: ``python -m fuzz.checkpoints --seconds 60``.

Every file must load as finite numbers, or be refused by a CheckpointError of one line with its name, within 2 seconds
of processor time and 1 GB, without a command run, a socket opened or a file written. Files are read in a process of
their own. What fails is kept, and read again by ``--replay FILE``. Cases are a function of (seed, number).
"""

import argparse
import io
import multiprocessing
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

SECONDS, BYTES, PATIENCE = 2.0, 10**9, 300.0  # processor time; bytes; by the clock, of a machine that may be busy
LARGEST_PART = 2 * 10**6  # bytes of an array in a pickle, and of what one change adds
FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "urllib.", "pty.", "webbrowser.")
HARMLESS = ("os.listdir", "os.scandir")
GLOBALS = (
    "os\nsystem", "posix\nsystem", "builtins\neval", "builtins\ngetattr", "builtins\nbytearray", "builtins\nset",
    "builtins\ncomplex", "collections\nOrderedDict", "collections\nCounter", "yacs.config\nCfgNode", "numpy\ndtype",
    "numpy\nndarray", "numpy.core.multiarray\nscalar", "numpy._core.multiarray\n_reconstruct",
    "numpy._core.numeric\n_frombuffer", "numpy.dtypes\nObjectDType", "_codecs\nencode", "torch\nSize", "torch\nTensor",
    "torch\nFloatStorage", "torch\nDoubleStorage", "torch\nBoolStorage", "torch\nComplexFloatStorage", "torch\nfloat64",
    "torch.storage\nUntypedStorage", "torch.nn.parameter\nParameter", "torch._utils\n_rebuild_tensor_v2",
    "torch._utils\n_rebuild_tensor_v3", "torch._utils\n_rebuild_parameter", "torch._utils\n_rebuild_sparse_tensor",
    "torch._utils\n_rebuild_meta_tensor_no_storage", "torch._utils\n_rebuild_wrapper_subclass", "torch\ndevice",
)  # fmt: skip
TEXTS = (
    "O8",
    "V8",
    "S4",
    "M8",
    "f8",
    ">f4",
    "f16",
    "latin1",
    "storage",
    "cpu",
    "0",
    "",
    "model",
    "layers.0.x",
    "\u0661",
)
INTEGERS = (-1, 0, 1, 7, 63, 64, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**64, -(2**63), 2**520)


class Maker:
    """Create the files of a seed.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int):
        import fast
        from fast.checkpoints import to_official

        self.seed, small = seed, {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8), "heads": (1, 1, 2, 2)}
        classifier = fast.create_model("aff_nano", num_classes=3, **small)
        options = {"hidden_dim": 16, "heads": 2, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 2}
        segmenter = fast.create_segmenter("aff_nano", backbone_overrides=small, **options)
        self.weights = [to_official(model.state_dict()) for model in (classifier, segmenter)]

    def __call__(self, number: int) -> tuple[str, bytes]:
        """Create a file: return its suffix and content."""
        draw = random.Random(f"{self.seed} {number}")
        content = self.content(draw)
        suffix, data = self.saved(draw, content)
        change = draw.choice([self.same, self.program, self.program, self.program, self.parts, self.bits])
        return suffix, change(draw, data)

    def content(self, draw):
        """Return a checkpoint's content with a few things wrong."""
        weights = dict(draw.choice(self.weights))
        for _ in range(draw.choice([0, 1, 1, 2, 5])):
            name = draw.choice([name for name in weights if isinstance(name, str)])
            change = draw.choice([self.drop, self.rename, self.replace, self.spoil])
            change(draw, weights, name)
        content = draw.choice(
            [weights, {"model": weights}, {"state_dict": weights}, {"model": {"state_dict": weights}}]
        )
        if draw.random() < 0.3:
            content = {**content, draw.choice(["extra", 5, None, b"x", 1.5, 2**70, (1,)]): self.value(draw)}
        return content

    def drop(self, draw, weights, name):
        """Remove a weight."""
        del weights[name]

    def rename(self, draw, weights, name):
        """Rename a weight."""
        parts = name.split(".")
        odd = ["1000000", "-1", "x", "63", "9" * 5000, "", "\n", "\u0661"]
        parts[draw.randrange(len(parts))] = draw.choice(odd)
        key = draw.choice([".".join(parts), 3, None, b"name", "module." + name])
        weights[key] = weights.get(name)

    def replace(self, draw, weights, name):
        """Replace a weight by something else."""
        weights[name] = self.value(draw)

    def spoil(self, draw, weights, name):
        """Replace a weight by one of a number or form that no weight has."""
        import torch

        weight = weights[name].clone() if isinstance(weights[name], torch.Tensor) else torch.ones(3)
        forms = [
            lambda w: w.double().fill_(float("nan")), lambda w: w.float() / 0, lambda w: w.long(), lambda w: w > 0,
            lambda w: w.to(torch.complex64), lambda w: w.half(), lambda w: w.bfloat16(), lambda w: w.flatten()[0],
            lambda w: w.flatten()[:0], lambda w: w[None], lambda w: w.expand(2**20, *w.shape), lambda w: w.to("meta"),
            lambda w: w.to_sparse(), lambda w: torch.quantize_per_tensor(w.float(), 0.1, 0, torch.qint8),
        ]  # fmt: skip
        weights[name] = draw.choice(forms)(weight)

    def value(self, draw, depth=0):
        """Return anything that can be saved."""
        import numpy as np
        import torch

        if depth < 3 and draw.random() < 0.5:
            items = [self.value(draw, depth + 1) for _ in range(draw.randrange(4))]
            keys = [draw.choice(["a", "b", 1, None, b"c", 2.5]) for _ in items]
            return draw.choice([items, tuple(items), dict(zip(keys, items, strict=True))])
        if draw.random() < 0.1:
            return laugh(draw.choice([list, tuple, dict]), draw.choice([5, 25]))
        return draw.choice(
            [
                None, True, draw.choice(INTEGERS), 1.5, float("nan"), draw.choice(TEXTS), "x" * 10_000, b"bytes",
                {1, "a"}, torch.ones(2), torch.zeros(0), torch.Size([2]), torch.float32, torch.device("cpu"),
                np.ones(3), np.float32(2), np.array(["text"]), np.array([None]), np.zeros(2, "f8,i4"), np.dtype("f4"),
                np.zeros((2, 3), ">f4"), np.asfortranarray(np.ones((2, 3))), complex(1, 2), bytearray(5),
            ]
        )  # fmt: skip

    def saved(self, draw, content) -> tuple[str, bytes]:
        """Return suffix and bytes in one of the formats; what cannot be saved becomes a small one that can."""
        import safetensors.torch
        import torch

        form, buffer = draw.choice(["zip", "zip", "zip", "old", "pickle", "safetensors"]), io.BytesIO()
        try:
            if form == "safetensors":
                return ".safetensors", safetensors.torch.save(content)
            if form == "pickle":
                return ".pkl", pickle.dumps(arrays(content), draw.choice([1, 2, 3, 4, 5]))
            torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
        except Exception:
            buffer = io.BytesIO()
            torch.save({"model": {"norm.weight": torch.ones(3)}}, buffer)
        return ".pth", buffer.getvalue()

    def same(self, draw, data: bytes) -> bytes:
        """Return a file as it is."""
        return data

    def bits(self, draw, data: bytes) -> bytes:
        """Change, cut or repeat bytes."""
        data = bytearray(data)
        for _ in range(draw.choice([1, 1, 4])):
            place = draw.randrange(len(data)) if data else 0
            action = draw.choice(["flip", "flip", "cut", "drop", "repeat"])
            if action == "flip" and data:
                data[place] ^= 1 << draw.randrange(8)
            elif action == "cut":
                del data[place:]
            else:
                part = data[place : place + draw.choice([1, 8, 100])]
                data[place : place + len(part)] = part * 2 if action == "repeat" else b""
        return bytes(data)

    def parts(self, draw, data: bytes) -> bytes:
        """Drop, rename, resize, double or pack parts of a zip file; other files are cut."""
        if not zipfile.is_zipfile(io.BytesIO(data)):
            return data[: draw.randrange(len(data) + 1)]
        parts = list(unzipped(data).items())
        place = draw.randrange(len(parts))
        name, part = parts[place]
        other = parts[draw.randrange(len(parts))][1]
        action = draw.choice(["drop", "rename", "longer", "shorter", "swap", "double", "pack", "endless"])
        if action == "drop":
            del parts[place]
        elif action == "double":
            parts.append((name, other))
        else:
            changed = {"longer": part + b"x", "shorter": part[:-1], "swap": other, "endless": bytes(10**8)}.get(
                action, part
            )
            parts[place] = (name + "x" if action == "rename" else name, changed)
        return rezipped(parts, zipfile.ZIP_DEFLATED if action in ("pack", "endless") else zipfile.ZIP_STORED)

    def program(self, draw, data: bytes) -> bytes:
        """Change the instructions of the pickle in a file, its checksum with them."""
        if zipfile.is_zipfile(io.BytesIO(data)):
            parts = unzipped(data)
            name = next(name for name in parts if name.endswith("data.pkl"))
            parts[name] = self.instructions(draw, parts[name])
            return rezipped(list(parts.items()))
        return self.instructions(draw, data)

    def instructions(self, draw, data: bytes) -> bytes:
        """Drop, double, swap, replace or insert instructions."""
        try:
            starts = [place for _, _, place in pickletools.genops(data)]
        except Exception:
            return self.bits(draw, data)
        ends = [*starts[1:], starts[-1] + 1]
        steps, rest = [data[a:b] for a, b in zip(starts, ends, strict=True)], data[ends[-1] :]
        for _ in range(draw.choice([1, 1, 2, 4, 16])):
            place = draw.randrange(1, len(steps)) if len(steps) > 1 else 0
            action = draw.choice(["drop", "double", "move", "new", "new", "argument", "argument", "argument"])
            if action == "drop":
                del steps[place]
            elif action == "double":
                part = steps[place : place + draw.choice([1, 5, 30])] * draw.choice([1, 1, 2000])
                steps[place:place] = part if sum(map(len, part)) < LARGEST_PART else []  # some hold a whole array
            elif action == "move":
                steps.insert(place, draw.choice(steps))
            elif action == "new":
                steps.insert(place, self.instruction(draw))
            else:
                steps[place] = self.argument(draw, steps[place])
            steps = steps or [b"."]
        return b"".join(steps) + rest

    def argument(self, draw, step: bytes) -> bytes:
        """Replace the argument of an instruction by another of its kind."""
        code = step[:1]
        if code in b"JKM\x8a":
            return whole(draw.choice(INTEGERS))
        if code in b"X\x8cUT":
            return string(draw.choice(TEXTS))
        if code in b"c":
            return b"c" + draw.choice(GLOBALS).encode() + b"\n"
        if code in b"hj":
            return code + bytes([draw.randrange(256)]) + (b"\0\0\0" if code == b"j" else b"")
        return self.instruction(draw)

    def instruction(self, draw) -> bytes:
        """Return an instruction."""
        simple = [
            bytes([code]) for code in b"NRbQ}])(teusa012l.o\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98"
        ]
        return draw.choice(
            [
                draw.choice(simple), draw.choice(simple), whole(draw.choice(INTEGERS)), string(draw.choice(TEXTS)),
                b"c" + draw.choice(GLOBALS).encode() + b"\n", b"h" + bytes([draw.randrange(40)]), b"q\x00",
                b"\x8e" + struct.pack("<Q", draw.choice([3, 2**40, 2**63])) + b"abc",
                b"X" + struct.pack("<I", 2**32 - 1), b"\x8b" + struct.pack("<I", 2**31 - 1),
                b"\x96" + struct.pack("<Q", 2**50), b"G" + struct.pack(">d", 1e300),
                b"]" * draw.choice([1, 100, 10_000]), b")" + b"\x85" * draw.choice([1, 100, 10_000]), b"I5\n", b"P0\n",
            ]
        )  # fmt: skip


def laugh(make, depth: int):
    """Return containers that hold one another tenfold, ``depth`` deep: small in memory, 10^depth written out."""
    value = make()
    for _ in range(depth):
        value = {str(i): value for i in range(10)} if make is dict else make([value] * 10)
    return value


def arrays(value):
    """Replace the tensors of a checkpoint's weights by arrays; other dicts may hold one another 10^25 times."""
    if isinstance(value, dict):
        return {
            name: arrays(item) if name in ("model", "state_dict") else as_array(item) for name, item in value.items()
        }
    return as_array(value)


def as_array(value):
    """Replace a tensor by an array, of its first rows where one row is repeated a million times."""
    if type(value).__name__ != "Tensor":
        return value
    return (value[:100] if value.nbytes > LARGEST_PART else value).numpy()


def whole(number: int) -> bytes:
    """Return the instruction for a whole number."""
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    size = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)


def string(text: str) -> bytes:
    """Return the instruction for a string."""
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def unzipped(data: bytes) -> dict[str, bytes]:
    """Return the parts of a zip file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {each.filename: archive.read(each) for each in archive.infolist()}


def rezipped(parts: list[tuple[str, bytes]], form: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file of parts, of which two may have one name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", form) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, part in parts:
            with archive.open(zipfile.ZipInfo(name), "w") as file:
                file.write(part)
    return buffer.getvalue()


def finite(value) -> bool:
    """Whether all tensors in nested containers are real and finite."""
    import torch

    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    if isinstance(value, torch.Tensor):
        return not value.is_complex() and value.layout == torch.strided and bool(torch.isfinite(value).all())
    return True


def look(path: Path, events: list[str]) -> str:
    """Read one file.

    Returns
    -------
    str
        "loaded", "fitted" (it is a whole network), "refused", or what is wrong.
    """
    from fast.checkpoints import CheckpointError, from_official, load

    events.clear()
    try:
        content = load(path)
        if not finite(content):
            return "wrong: numbers that are not finite were loaded"
        outcome = "loaded"
        try:
            weights = from_official(content)
            outcome = "fitted" if finite(weights) else "wrong: weights that are not finite fit"
        except CheckpointError as error:
            if len(str(error).splitlines()) != 1 or len(str(error)) > 50_000:
                outcome = f"wrong: a message of {len(str(error))} characters: {str(error)[:200]!r}"
    except CheckpointError as error:
        plain = str(path) in str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        outcome = "refused" if plain else f"wrong: the message {str(error)[:300]!r}"
    except BaseException as error:
        outcome = f"wrong: {type(error).__name__}: {str(error)[:300]}"
    return f"wrong: it did {events[0]}" if events else outcome


def serve(pipe) -> None:
    """Read the files that a pipe names; send how each ended, its seconds and the bytes that it added at most."""
    import torch

    import fast.checkpoints

    torch.set_num_threads(1)
    events, watching = [], False

    def watch(event, arguments):
        writes = event == "open" and any(c in str(arguments[1]) for c in "wax+")
        if watching and (writes or (event.startswith(FORBIDDEN) and event not in HARMLESS)):
            events.append(f"{event} {str(arguments)[:100]}")

    sys.addaudithook(watch)
    with tempfile.TemporaryDirectory() as folder:  # what torch and safetensors load with their first file
        for name in ("a.pth", "a.safetensors"):
            (Path(folder) / name).write_bytes(b"")
            look(Path(folder) / name, events)
        torch.save({"a": torch.ones(3)}, Path(folder) / "a.pth")
        fast.checkpoints.load(Path(folder) / "a.pth")
    while (path := pipe.recv()) is not None:
        before, start, watching = peak(), time.process_time(), True
        outcome = look(path, events)
        watching = False
        pipe.send((outcome, time.process_time() - start, peak() - before))


def peak() -> int:
    """Return the largest memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Reader:
    """A process that reads files, started anew when one kills it."""

    def __init__(self):
        self.process = None

    def __call__(self, path: Path) -> tuple[str, float, int]:
        """Read a file: return outcome, seconds, bytes."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(path)
            if self.pipe.poll(PATIENCE):
                return self.pipe.recv()
            outcome = f"wrong: no answer in {PATIENCE:.0f} seconds"
        except (EOFError, BrokenPipeError):
            self.process.join()
            outcome = f"wrong: the process died, exit code {self.process.exitcode}"
        self.close()
        return outcome, 0.0, 0

    def close(self):
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.join()
        self.process = None


def verdict(result: tuple[str, float, int]) -> str:
    """Return an outcome, or the limit that was passed."""
    outcome, seconds, size = result
    if seconds > SECONDS:
        return f"wrong: {seconds:.1f} seconds ({outcome})"
    return f"wrong: {size / 1e9:.2f} GB ({outcome})" if size > BYTES else outcome


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.checkpoints", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path, help="read this file only")
    options = parser.parse_args()
    reader = Reader()
    if options.replay:
        print(verdict(reader(options.replay)))
        reader.close()
        return 0
    make, counts, slowest, largest, number = Maker(options.seed), {}, 0.0, 0, 0
    kept, end = Path(tempfile.mkdtemp(prefix="checkpoints_")), time.monotonic() + options.seconds
    while time.monotonic() < end:
        suffix, data = make(number)
        path = kept / f"{options.seed}_{number}{suffix}"
        path.write_bytes(data)
        result = reader(path)
        outcome = verdict(result)
        slowest, largest, number = max(slowest, result[1]), max(largest, result[2]), number + 1
        counts[outcome.partition(":")[0]] = counts.get(outcome.partition(":")[0], 0) + 1
        if outcome.startswith("wrong"):
            print(f"{path}: {outcome}")
        else:
            path.unlink()
    reader.close()
    shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"{number} files of seed {options.seed}: {shown}; at most {slowest:.2f} s and {largest / 1e6:.0f} MB more")
    if counts.get("wrong"):
        return 1
    kept.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
