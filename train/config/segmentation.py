"""What a run of train.segment is; read and overridden as :mod:`train.config.loader` says."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from . import classification as base
from .section import CONFIGS, Names, Paths, Section, StartMethod

Folders = Annotated[Paths, BeforeValidator(lambda value: [] if value is None else value), Field(max_length=2)]


class Model(Section):
    """Which network."""

    name: str = Field("aff_mini", description="backbone, a name of fast.list_models()")
    head: Literal["mask2former", "hcformer"] = Field("mask2former", description="what reads the backbone's tokens")
    num_classes: int | None = Field(None, ge=1, description="number of classes; null: the data's")
    backbone: dict[str, Any] = Field({}, description="fields of the backbone's Config, such as alpha: 8")
    overrides: dict[str, Any] = Field({}, description="fields of fast.HeadConfig, such as num_queries: 250")
    shepard_power: float | None = Field(None, gt=0, description="fix the interpolation's power; null: learnt from 6")
    init_gain: float | None = Field(
        None, gt=0, description="backbone's first weights: std gain / sqrt(inputs); null: 0.02"
    )
    backbone_init: str | None = Field(None, description="classifier, ours or official, whose backbone to start from")
    init: str | None = Field(None, description="segmenter, ours or official, to start from")
    new_classifier: bool = Field(False, description="init's classifier is left out: other classes")
    grad_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")


class Data(Section):
    """Where the pictures come from and how training and testing see them."""

    source: Literal["images", "digits"] = Field("images", description="images on disk, or Scattered Digits")
    path: Paths = Field([], description="a data set's folder; or two of one form (COCO jsons): to train, to validate")
    kind: str | None = Field(None, description="the folder's layout; null: guessed")
    task: Literal["semantic", "instance", "panoptic"] | None = Field(None, description="null: the richest there is")
    images: Folders = Field([], description="folder of the pictures of jsons, or two: to train, to validate")
    skip_empty: bool = Field(False, description="COCO: train on pictures with objects only")
    boxes: bool = Field(False, description="COCO, VOC: objects without an outline have their box for a mask")
    resize: Literal["short_side", "large_jitter", "none"] = Field("short_side", description="how training scales")
    scales: tuple[float, float] = Field((0.5, 2.0), description="least and greatest multiple")
    base: int = Field(512, ge=32, description="short side that short_side multiplies, pixels")
    longest: int | None = Field(None, ge=32, description="long side's limit for short_side; null: 4 x base")
    crop: tuple[int, int] = Field((512, 512), description="height and width that the network sees, pixels")
    most_of_one: float = Field(1.0, gt=0, le=1, description="largest share of a crop that one class may take")
    jitter: bool = Field(False, description="distort colours as SSD does")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    test_short: int | None = Field(None, ge=32, description="short side for testing; null: the picture's own size")
    test_longest: int | None = Field(None, ge=32, description="most of the long side for testing")
    workers: int = Field(8, ge=0, description="loader processes of each rank")
    cache: bool = Field(False, description="each process keeps the pictures it has read in memory: for small data sets")
    start_method: StartMethod = Field(None, description="how they are started; null: Python's default on this system")
    on_bad_image: Literal["skip", "stop"] = Field("skip", description="skip: use the next readable image, and count")
    digits: dict[str, Any] = Field({}, description="fields of DigitsConfig, for source: digits")
    train_length: int = Field(10000, ge=1, description="pictures a pass, for source: digits")
    val_length: int = Field(1000, ge=1, description="validation pictures, for source: digits")


class Optim(Section):
    """The optimiser and its limits."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonal steps for matrices, NAdamW for all else; small networks learn faster"
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate; null: lr_per_batch x total batch / batch")
    lr_per_batch: float = Field(2e-4, gt=0, description="peak learning rate for a total batch of optim.batch")
    batch: int = Field(32, ge=1, description="total batch that lr_per_batch is for")
    backbone: float = Field(0.1, ge=0, description="the backbone's learning rate, as a multiple")
    weight_decay: float = Field(0.05, ge=0, description="none is put on norms, embeddings and 1-D parameters")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    clip: float = Field(0.01, gt=0, description="largest norm of the whole gradient")
    freeze: Names = Field([], description="modules or parameters kept as they are: backbone, backbone.stages.0, *norm*")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="a backbone layer's learning rate, as a multiple of the next's"
    )


class Schedule(Section):
    """How the learning rate falls, set at every step."""

    renamed: ClassVar[dict[str, str]] = {"updates": "max_steps", "warmup_updates": "warmup_steps"}

    max_steps: int = Field(80000, ge=1, description="steps of the whole run")
    kind: Literal["poly", "steps"] = Field("poly", description="(1 - done)^power, or a fall at each of steps")
    power: float = Field(0.9, gt=0, description="of poly")
    steps: list[int] = Field([], description="steps after which the rate falls")
    factor: float = Field(0.1, gt=0, description="to which part it falls at each step")
    warmup_steps: int = Field(0, ge=0, description="steps that lead linearly from warmup_lr to the peak")
    warmup_lr: float = Field(0.0, ge=0, description="learning rate of the first step, if there is a warm-up")


class Loss(Section):
    """How masks are compared."""

    points: int = Field(12544, ge=1, description="points sampled of a mask")


class Evaluator(Section):
    """What validation measures."""

    tasks: list[Literal["semantic", "instance", "panoptic"]] = Field([], description="none: the data's task")
    areas: tuple[float, float] | None = Field(None, description="small below, large above, pixels; null: COCO's")
    mean_precision: float | None = Field(
        None, ge=0, le=1, description="instance: least score of what counts for BBBC038's measure; null: not measured"
    )
    object_threshold: float = Field(0.8, ge=0, le=1, description="panoptic: least probability of a segment's class")
    overlap_threshold: float = Field(0.8, ge=0, le=1, description="panoptic: least share of its mask left to it")
    top: int = Field(100, ge=1, description="instances kept of a picture, or of each of its tiles")
    tile: int | None = Field(None, ge=64, description="side of overlapping tiles, pixels the network sees; null: none")
    tile_overlap: int | None = Field(
        None, ge=8, description="pixels that neighbours share; null: an eighth of the tile"
    )
    flip: bool = Field(False, description="look at the mirrored picture, too")
    scales: list[Annotated[float, Field(gt=0, le=8)]] = Field([1.0], min_length=1, description="sizes to look at")

    @model_validator(mode="after")
    def overlapping(self):
        """Refuse tiles that do not overlap, or of which more than two lie over each other in a row."""
        if self.tile_overlap and not self.tile:
            raise ValueError("evaluator.tile_overlap needs evaluator.tile, the tiles' side")
        if self.tile and self.shared > self.tile // 2:
            raise ValueError(
                f"evaluator.tile_overlap must be at most half of evaluator.tile ({self.tile // 2}), "
                f"not {self.tile_overlap}"
            )
        return self

    @property
    def several(self) -> bool:
        """Whether a picture is looked at otherwise than once, at its size for testing."""
        return self.flip or self.scales != [1]

    @property
    def shared(self) -> int:
        """Pixels that neighbouring tiles share, at least; 0 without tiles."""
        return self.tile_overlap or (self.tile or 0) // 8


class Run(base.Run):
    """How and where it runs."""

    output: str = Field("outputs/segment", description="folder for checkpoints and logs")
    total_batch: int = Field(32, ge=1, description="images a step, over all ranks and accumulation steps")
    batch_size: int = Field(4, ge=1, description="images a rank's forward pass sees")
    save_every: int = Field(1000, ge=1, description="steps between checkpoints; each evaluation saves too")
    eval_every: int = Field(5000, ge=1, description="steps between evaluations")


class Config(Section):
    """A whole run of train.segment."""

    folder: ClassVar[Path] = CONFIGS / "segmentation"
    renamed: ClassVar[dict[str, str]] = {"judge": "evaluator"}

    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    evaluator: Evaluator = Evaluator()
    run: Run = Run()

    @model_validator(mode="after")
    def consistent(self):
        """Refuse settings that contradict each other."""
        if self.schedule.kind == "steps" and not self.schedule.steps:
            raise ValueError("schedule.kind steps needs schedule.steps, the steps after which the rate falls")
        if min(self.data.crop) < 32:
            raise ValueError(f"data.crop must be at least 32 x 32 pixels (it is {self.data.crop})")
        if len(self.data.path) > 2:
            raise ValueError("data.path takes one folder, or one path to train on and one to validate on")
        return self
