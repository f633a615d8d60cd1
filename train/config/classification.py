"""What a run of train.classify is; read and overridden as :mod:`train.config.loader` says."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from .section import CONFIGS, Names, Paths, Section, StartMethod


class Model(Section):
    """Which network."""

    name: str = Field("aff_mini", description="a name of fast.list_models()")
    num_classes: int = Field(1000, ge=1, description="number of classes")
    drop_path: float | None = Field(None, ge=0, lt=1, description="last block's rate; null: the variant's own")
    overrides: dict[str, Any] = Field({}, description="further arguments of fast.create_model, such as rate: 0.2")
    init_gain: float | None = Field(None, gt=0, description="first weights: std gain / sqrt(inputs); null: 0.02")
    init: str | None = Field(None, description="weights to start from, ours or official; another head is replaced")
    grad_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")


class Data(Section):
    """Where the images come from."""

    source: Literal["images", "digits"] = Field("images", description="images on disk, or Scattered Digits")
    path: Paths = Field([], description="folders that each hold train/ and val/ (class folders, or .tar shards)")
    train: Paths = Field([], description="shard patterns for training instead of path, as /a/train-{000..127}.tar")
    val: Paths = Field([], description="shard patterns for validation instead of path")
    size: int = Field(224, ge=32, description="side of the square the network sees, pixels")
    test_resize: int = Field(256, ge=32, description="short side before the test crop, pixels")
    workers: int = Field(8, ge=0, description="loader processes of each rank")
    start_method: StartMethod = Field(None, description="how they are started; null: Python's default on this system")
    shuffle_block: int = Field(16, ge=1, description="shards mixed with one another at a time")
    on_bad_image: Literal["skip", "stop"] = Field("skip", description="skip: use the next readable image, and count")
    digits: dict[str, Any] = Field({}, description="fields of DigitsConfig, for source: digits")
    digits_first: dict[str, Any] = Field({}, description="fields of DigitsConfig that differ in the first epochs")
    first_epochs: int = Field(0, ge=0, description="epochs that train on digits_first, for source: digits")
    train_length: int = Field(10000, ge=1, description="pictures an epoch, for source: digits")
    val_length: int = Field(1000, ge=1, description="validation pictures, for source: digits")


class Augment(Section):
    """What is done to training images."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    scale: tuple[float, float] = Field((0.08, 1.0), description="share of the area a random crop takes")
    randaugment: str | None = Field("rand-m9-mstd0.5-inc1", description="timm's RandAugment string, or null")
    color_jitter: float = Field(0.4, ge=0, description="colour jitter; timm leaves it out where RandAugment is on")
    erasing: float = Field(0.25, ge=0, le=1, description="probability of random erasing")
    mixup: float = Field(0.8, ge=0, description="mixup's alpha; 0: off")
    cutmix: float = Field(1.0, ge=0, description="cutmix's alpha; 0: off")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")


class Optim(Section):
    """AdamW and its limits."""

    lr: float | None = Field(None, gt=0, description="peak learning rate; null: lr_per_512 x total batch / 512")
    lr_per_512: float = Field(5e-4, gt=0, description="peak learning rate for a total batch of 512")
    weight_decay: float = Field(0.05, ge=0, description="none is put on 1-D parameters")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    clip: float = Field(5.0, gt=0, description="largest norm of the whole gradient")
    freeze: Names = Field([], description="modules or parameters kept as they are: backbone, stages.0, *norm*")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="a layer's learning rate, as a multiple of the next's"
    )


class Schedule(Section):
    """Linear warm-up, then cosine, set at every step."""

    epochs: int = Field(300, ge=1, description="epochs in all, warm-up included")
    warmup_epochs: int = Field(20, ge=0, description="epochs of warm-up")
    warmup_lr: float = Field(5e-7, ge=0, description="learning rate of the first step")
    min_lr: float = Field(5e-6, ge=0, description="learning rate at the end")


class Run(Section):
    """How and where it runs."""

    output: str = Field("outputs/run", description="folder for checkpoints and logs")
    seed: int = Field(0, ge=0, description="seed of everything random")
    total_batch: int = Field(4096, ge=1, description="images a step, over all ranks and accumulation steps")
    batch_size: int = Field(128, ge=1, description="images a rank's forward pass sees")
    device: str = Field("auto", description="auto, cpu or cuda")
    amp: Annotated[Literal["off", "bf16", "fp16"], BeforeValidator(lambda value: value or "off")] = Field(
        "bf16", description="autocast's precision"
    )
    compile: bool = Field(False, description="torch.compile the model")
    batch_norm: Literal["local", "sync", "frozen"] = Field(
        "local", description="each rank's own statistics, over all ranks (GPU only), or the stored ones unchanged"
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights (best.pt: the better); 0: off")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: torch's choice")
    log_every: int = Field(50, ge=1, description="steps between log lines")
    save_every: int = Field(500, ge=1, description="steps between checkpoints; each epoch's end saves too")
    eval_every: int = Field(1, ge=1, description="epochs between evaluations")
    tensorboard: bool = Field(True, description="write TensorBoard files where the package is installed")


class Config(Section):
    """A whole run of train.classify."""

    folder: ClassVar[Path] = CONFIGS

    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    run: Run = Run()

    @model_validator(mode="after")
    def even_batches(self):
        """Mixing pairs images, so each forward pass must see an even number."""
        if self.run.batch_size % 2 and (self.augment.mixup or self.augment.cutmix):
            raise ValueError(f"run.batch_size must be even for mixup and cutmix (it is {self.run.batch_size})")
        return self
