"""What is measured, and what it is compared with."""

from dataclasses import dataclass, replace

SWIN = "swin_tiny_patch4_window7_224"
SWIN_MINI = "swin of AFF-Mini's widths and depths"
SWIN_SEGMENTER = "Mask2Former with Swin-Tiny (transformers)"
RIVALS = {("model", "aff_mini"): SWIN_MINI, ("segmenter", "aff_tiny"): SWIN_SEGMENTER}  # (group, what): else SWIN
LARGE = ((512, 512), (1024, 1024), (1024, 2048))
NEIGHBORS = ("nearest clusters", "nearest tokens", "local stride", "stage geometry")
FORWARD, BACKWARD, STEP = "forward", "forward + backward", "training step"


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    group: str  # "operator", "model", "geometry" (its share of a forward pass) or "segmenter"
    what: str  # an operator's or a model's name
    task: str = FORWARD
    size: tuple = (224, 224)  # H, W, pixels
    batch: int = 4
    stage: int | None = None  # of an operator: whose tokens and channels it gets, 1 to 4
    dtype: str = "float32"
    mode: str = "eager"  # or "compiled", or "captured": compiled, then captured in a CUDA graph
    plain: bool = False  # take the plainest path of every operator: gather token by token, compare all pairs

    def __str__(self):
        parts = [self.what, self.task, f"{self.size[0]}x{self.size[1]}", f"batch {self.batch}", self.dtype]
        parts += [f"stage {self.stage}"] * (self.stage is not None) + [self.mode] * (self.mode != "eager")
        return f"{self.group}: " + ", ".join(parts + ["plain paths"] * self.plain)


@dataclass(frozen=True)
class Comparison:
    """A case and what it is timed against, in turn."""

    case: Case
    swin: bool = False
    plain: bool = False

    def rivals(self):
        """Return {column of the ratio: the case to compare with}."""
        rival = RIVALS.get((self.case.group, self.case.what), SWIN)
        rivals = {"to_swin": replace(self.case, what=rival)} if self.swin else {}
        return rivals | ({"to_plain": replace(self.case, plain=True)} if self.plain else {})


def comparisons(device_type, quick=False):
    """List all that is measured on a device, as ``Comparison``s.

    Parameters
    ----------
    device_type : str
        "cpu" or "cuda".
    quick : bool
        A few tiny cases, one of every kind.
    """
    if quick:
        return list(_quick())
    on_gpu = device_type == "cuda"
    models = _gpu_models() if on_gpu else _cpu_models()
    return [*models, *_geometry(), *_segmenter(), *_operators(on_gpu)]


def _cpu_models():
    """Yield the models' comparisons; batches of 64 only for the smallest one's forward pass, as others take minutes."""
    for name in ("aff_mini", "aff_tiny"):
        for batch in (1, 4, 8):
            yield Comparison(Case("model", name, batch=batch), swin=True, plain=batch < 8)
            yield Comparison(Case("model", name, STEP, batch=batch), swin=True, plain=batch == 4)
    yield Comparison(Case("model", "aff_mini", batch=64), swin=True)
    for size in LARGE:
        yield Comparison(Case("model", "aff_mini", size=size, batch=1), swin=True, plain=size == LARGE[0])


def _gpu_models():
    low = {"dtype": "bfloat16"}
    for name in ("aff_mini", "aff_tiny"):
        for task in (FORWARD, STEP):
            for batch in (1, 8, 64):
                yield Comparison(Case("model", name, task, batch=batch, **low), swin=True, plain=True)
            for size in LARGE:
                yield Comparison(Case("model", name, task, size, 1, **low), swin=True, plain=size == LARGE[0])
    for task in (FORWARD, STEP):
        for mode in ("eager", "compiled", "captured"):
            yield Comparison(Case("model", "aff_tiny", task, batch=128, mode=mode, **low), swin=True)


def _geometry():
    for size, batch in (((224, 224), 4), *((size, 1) for size in LARGE)):
        yield Comparison(Case("geometry", "aff_mini", size=size, batch=batch))


def _segmenter():
    for size in (LARGE[0], LARGE[2]):
        yield Comparison(Case("segmenter", "aff_tiny", size=size, batch=1), swin=True)
    yield Comparison(Case("segmenter", "aff_tiny", STEP, (256, 256), 2), swin=True)
    yield Comparison(Case("segmenter", "aff_mini", size=(1024, 2048), batch=1))


def _operators(on_gpu):
    for size, batch in (((224, 224), 4), *((size, 1) for size in LARGE)):
        plain = size != (1024, 2048) if on_gpu else size[0] <= 512  # beyond, comparing all pairs takes minutes
        for name in NEIGHBORS:
            yield Comparison(Case("operator", name, size=size, batch=batch, stage=2), plain=plain)
        yield Comparison(Case("operator", "stage geometry", size=size, batch=batch, stage=1), plain=plain)
    network = {"batch": 128, "dtype": "bfloat16"} if on_gpu else {"batch": 4}
    for task in (FORWARD, BACKWARD):
        for stage in (1, 2, 3, 4):
            yield Comparison(Case("operator", "attention", task, stage=stage, **network), plain=True)
        for stage in (1, 2, 3):
            yield Comparison(Case("operator", "merging", task, stage=stage, **network), plain=True)
        yield Comparison(Case("operator", "deformable reading", task, LARGE[0], batch=1), plain=True)


def _quick():
    tiny = {"size": (64, 64), "batch": 2}
    for task in (FORWARD, STEP):
        yield Comparison(Case("model", "aff_nano", task, **tiny), swin=True, plain=True)
    yield Comparison(Case("geometry", "aff_nano", **tiny))
    yield Comparison(Case("segmenter", "aff_nano", **tiny))
    for name in NEIGHBORS:
        yield Comparison(Case("operator", name, stage=2, **tiny), plain=True)
    for name in ("attention", "merging", "deformable reading"):
        yield Comparison(Case("operator", name, BACKWARD, stage=2, **tiny), plain=True)
