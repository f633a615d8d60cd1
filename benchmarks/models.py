"""Models, ready to be timed; and the share of geometry in a forward pass."""

import contextlib
from unittest import mock

import timm
import torch

import fast
import fast.backbone
from fast.matching import Objects, SetLoss
from fast.neighborhoods import StageGeometry

from .cases import STEP, SWIN, SWIN_MINI, SWIN_SEGMENTER
from .clock import seconds

GEOMETRY = (  # clusters, neighbours and the plan of attention; tokens put cluster after cluster; local stride
    (fast.backbone, "stage_geometry"),
    (StageGeometry, "renumbered"),
    (fast.backbone, "local_stride"),
)
CLASSES, QUERIES = 19, 100  # of the segmenter: Cityscapes
OBJECTS = 10  # of a picture that a segmenter trains on


def make(case):
    """Return a fresh model: ours, or timm's Swin for the case's image size."""
    torch.manual_seed(0)
    if case.what == SWIN_SEGMENTER:
        return swin_segmenter()
    if case.group == "segmenter":
        return fast.create_segmenter(case.what, num_classes=CLASSES, num_queries=QUERIES)
    if case.what == SWIN_MINI:
        return swin_mini(case.size)
    return timm.create_model(SWIN, img_size=case.size) if case.what == SWIN else fast.create_model(case.what)


class Widths(tuple):
    """The stages' channels, which timm's Swin takes as they are; it multiplies them only to learn the last."""

    def __mul__(self, factor):
        return self[-1]


def swin_mini(size):
    """Return timm's Swin with the widths, depths, heads and MLP ratio of AFF-Mini."""
    mini = fast.model_config("aff_mini")
    options = {"depths": mini.depths, "num_heads": mini.heads, "mlp_ratio": mini.mlp_ratio}
    return timm.models.SwinTransformer(img_size=size, embed_dim=Widths(mini.dims), **options)


def swin_segmenter():
    """Return transformers' Mask2Former with Swin-Tiny, of as many classes and queries as ours."""
    import transformers

    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    tiny = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    backbone = transformers.SwinConfig(**tiny, drop_path_rate=0.2, out_features=stages)
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, num_queries=QUERIES)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def masks_and_labels(case, device):
    """Return OBJECTS boxes as masks, bool (g, H, W), and their classes (g,), for each picture of a case."""
    height, width = case.size
    y, x = torch.arange(height)[:, None], torch.arange(width)
    side = [4 + 3 * number for number in range(OBJECTS)]
    masks = torch.stack([(y // 2 % height < s) & (x // 2 % width < 2 * s) for s in side]).to(device)
    return [(masks, torch.arange(OBJECTS, device=device) % CLASSES)] * case.batch


def loss_of(case, called, images, device):
    """Return a function that computes the training loss of a model's forward pass."""
    if case.group == "model":
        labels = torch.arange(case.batch, device=device)
        return lambda: torch.nn.functional.cross_entropy(called(images), labels)
    pairs = masks_and_labels(case, device)
    if case.what == SWIN_SEGMENTER:
        labels = {"mask_labels": [m.float() for m, _ in pairs], "class_labels": [c for _, c in pairs]}
        return lambda: called(pixel_values=images, **labels).loss.squeeze()
    objects, criterion = [Objects(c, m) for m, c in pairs], SetLoss()
    return lambda: criterion(called(images), objects)["loss"]


def pictures(case, device):
    """Return images (B, 3, H, W) of noise, float32."""
    return torch.randn(case.batch, 3, *case.size, generator=torch.Generator().manual_seed(0)).to(device)


def prepare(case, device):
    """Return a function that runs a model once: a forward pass without gradients, or a training step with AdamW.

    Parameters
    ----------
    case : Case
        Of group "model" or "segmenter". In bfloat16 by autocast.
    device : torch.device
    """
    training = case.task == STEP
    model = make(case).train(training).to(device)
    called = compiled(model) if case.mode != "eager" else model
    images, low = pictures(case, device), case.dtype == "bfloat16"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=device.type == "cuda") if training else None

    def forward():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
            called(pixel_values=images) if case.what == SWIN_SEGMENTER else called(images)

    loss_function = loss_of(case, called, images, device) if training else None

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = loss_function()
        loss.backward()
        optimizer.step()

    run = step if training else forward
    return captured(run) if case.mode == "captured" else run


def compiled(model):
    """Compile a model to one graph; what was compiled before is forgotten, as variants of a function are limited."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, dynamic=False)


def captured(run):
    """Capture ``run`` in a CUDA graph, after three calls of it, and return what replays the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def geometry_share(case, device):
    """Time geometry inside two forward passes of a fresh model, and the passes.

    Returns
    -------
    list of (geometry, pass)
        Seconds; of the first call, which makes the geometry of the full grid, and of the next, which reuses it.
    """
    model, images = make(case).eval().to(device), pictures(case, device)
    calls = []
    for _ in range(2):
        spent = []
        with torch.no_grad(), _timed(spent, device):
            whole = seconds(lambda: model(images), device)
        calls.append((sum(spent), whole))
    return calls


@contextlib.contextmanager
def _timed(spent, device):
    """Append the seconds of every call of ``GEOMETRY`` to a list."""

    def wrap(function):
        def timed(*arguments, **options):
            result = []
            spent.append(seconds(lambda: result.append(function(*arguments, **options)), device))
            return result[0]

        return timed

    with contextlib.ExitStack() as stack:
        for owner, name in GEOMETRY:
            stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        yield
