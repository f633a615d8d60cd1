"""What both heads share: their output, and batches of images of several sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .checks import shown
from .matching import Objects, SetLoss
from .patch_embedding import _check_shape, prepare_image

OUTSIDE = -20.0  # mask logit in the padding: no object there


@dataclass(frozen=True, eq=False)
class SegmenterOutput(Mapping):
    """What a segmenter returns; named as transformers names it, so that its post-processing reads it.

    Like a ``ModelOutput`` of transformers it is a mapping of the names of what is there, the loss first:
    ``output["loss"]``, ``output[0]``, ``output[:2]``, ``output.to_tuple()``, ``**output``. It is a pytree.
    """

    class_queries_logits: Tensor  # (B, q, classes + 1); the last class is "no object"
    masks_queries_logits: Tensor  # (B, q, h, w)
    auxiliary_logits: list  # of dicts with both keys: of the learnt queries and of every layer but the last; or empty
    loss: Tensor | None = None  # of the labels given

    def __iter__(self):
        names = ("loss", "class_queries_logits", "masks_queries_logits", "auxiliary_logits")
        there = {name: getattr(self, name) for name in names}
        return iter([name for name, x in there.items() if x is not None and (name != "auxiliary_logits" or len(x))])

    def __len__(self):
        return len(list(iter(self)))

    def __getitem__(self, key):
        """Return a field by its name, or those that are there by number or slice."""
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in iter(self):
            raise KeyError(key)
        return getattr(self, key)

    def to_tuple(self):
        """Return what is there, as a tuple."""
        return tuple(getattr(self, name) for name in self)


torch.export.register_dataclass(SegmenterOutput, serialized_type_name="autofocusformer.SegmenterOutput")


def pad_images(images):
    """Stack images of several sizes, filled up with zeros at the right and at the bottom.

    Parameters
    ----------
    images : list of (3, H, W) tensors
        Of one dtype.

    Returns
    -------
    images : (B, 3, H, W) tensor
        With the largest H and the largest W.
    pixel_mask : (B, H, W) bool tensor
        True where there is an image.
    """
    images = list(images) if isinstance(images, tuple | list | Tensor) else []
    dense = [image for image in images if isinstance(image, Tensor) and image.layout == torch.strided]
    if not images or len(dense) < len(images) or not all(image.ndim == 3 for image in dense):
        raise TypeError("images must be a list of one or more tensors of shape (3, H, W)")
    if len({(len(image), image.dtype) for image in images}) > 1:
        found = ", ".join(sorted({f"{len(image)} channels of {image.dtype}" for image in images}))
        raise ValueError(f"images must have 3 channels and one dtype, not {found}")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pads = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
    masks = [nn.functional.pad(torch.ones_like(x[0], dtype=torch.bool), p) for x, p in zip(images, pads, strict=True)]
    return torch.stack([nn.functional.pad(x, p) for x, p in zip(images, pads, strict=True)]), torch.stack(masks)


class Segmenter(nn.Module):
    """A backbone with a head; subclasses define ``segment(images)`` for images of one size."""

    def forward(
        self,
        images=None,
        pixel_mask=None,
        output_auxiliary_logits=None,
        *,
        pixel_values=None,
        mask_labels=None,
        class_labels=None,
    ):
        """Segment a batch.

        Images of one size run together, each without its padding, so that an image's result does not depend on how much
        it was padded: tokens, clusters and importance would.

        Parameters
        ----------
        images : (B, 3, H, W) tensor
            As the backbone takes them.
        pixel_mask : (B, H, W) bool or integer tensor, optional
            1 where there is an image, from the top left corner; 0 in the padding (``pad_images``). By default all is
            image.
        output_auxiliary_logits : bool, optional
            Whether to return the predictions before the last one too, which the loss wants and costs time; by default
            where gradients are recorded.
        pixel_values : (B, 3, H, W) tensor
            The images by the name that transformers gives them.
        mask_labels : list of (g, H, W) tensors, optional
            Each image's objects, padded as it is, bool or 0 to 1.
        class_labels : list of (g,) int64 tensors, optional
            Their classes. With both, the output has the ``loss`` of ``matching.SetLoss`` (a sum over all predictions).

        Returns
        -------
        SegmenterOutput
            On the grid of the padded images; where an image's own grid ends, mask logits are -20.

        Raises
        ------
        ValueError
            A pixel mask of another shape or one that is no rectangle; several sizes with ``sine_max="batch"``; labels
            that do not fit the images or each other.
        TypeError
            No images, or under both names.
        """
        if (images is None) == (pixel_values is None):
            raise TypeError("images must be given once: as images or as pixel_values")
        images = pixel_values if images is None else images
        if mask_labels is None and class_labels is None:
            return self._predict(images, pixel_mask, output_auxiliary_logits)
        _check_shape(images)
        objects = _labels(mask_labels, class_labels, images, self.config.num_classes)
        found = self._predict(images, pixel_mask, True)
        found = replace(found, loss=SetLoss()(found, objects)["loss"])
        keep = torch.is_grad_enabled() if output_auxiliary_logits is None else output_auxiliary_logits
        return found if keep else replace(found, auxiliary_logits=[])

    def _predict(self, images, pixel_mask, output_auxiliary_logits):
        _check_shape(images)
        if images.shape[0] == 0:
            return self._of_nothing(prepare_image(images))
        auxiliary = torch.is_grad_enabled() if output_auxiliary_logits is None else output_auxiliary_logits
        if pixel_mask is None:
            return self.segment(images, auxiliary)
        groups = _groups(images, pixel_mask)
        if len(groups) > 1 and self.config.sine_max == "batch":
            raise ValueError('sine_max="batch" ties an image to its batch; for several sizes use sine_max="image"')
        grid_size = [-(-side // 4) for side in images.shape[2:]]
        outputs = [self.segment(images[index, :, :h, :w], auxiliary) for (h, w), index in groups.items()]
        back = torch.tensor(sum(groups.values(), [])).argsort().to(images.device)
        predictions = [[_pair(o) for o in (*output.auxiliary_logits, output)] for output in outputs]
        return output([_merged(layer, back, grid_size) for layer in zip(*predictions, strict=True)])

    def _of_nothing(self, images):
        """The output for a batch of no images, prepared."""
        config, (h, w) = self.config, (side // 4 for side in images.shape[2:])
        layers = config.decoder_layers + 1
        classes = images.new_empty(0, config.num_queries, config.num_classes + 1)
        return output([(classes, images.new_empty(0, config.num_queries, h, w))] * layers)


def output(predictions):
    """Return the SegmenterOutput of a list of (classes (B, q, classes + 1), mask logits (B, q, h, w))."""
    names = ("class_queries_logits", "masks_queries_logits")
    return SegmenterOutput(*predictions[-1], [dict(zip(names, pair, strict=True)) for pair in predictions[:-1]])


def _labels(mask_labels, class_labels, images, classes):
    """A list of Objects of the labels; ValueError where they do not fit."""
    if mask_labels is None or class_labels is None:
        raise ValueError("mask_labels and class_labels go together: give both or neither")
    for name, labels in (("mask_labels", mask_labels), ("class_labels", class_labels)):
        many = labels if isinstance(labels, tuple | list) else [None]
        if not all(isinstance(each, Tensor) for each in many):
            raise TypeError(f"{name} must be a list of tensors, one an image, not {shown(type(labels).__name__)}")
    if not len(mask_labels) == len(class_labels) == len(images) > 0:
        found = f"{len(mask_labels)} and {len(class_labels)} for {len(images)}"
        raise ValueError(f"mask_labels and class_labels must hold one tensor an image, not {found}")
    for i, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if masks.ndim != 3 or labels.shape != masks.shape[:1]:
            shapes = f"{tuple(masks.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"mask_labels {i} and class_labels {i} must have shapes (g, H, W) and (g,), not {shapes}")
        if (
            labels.is_floating_point()
            or labels.is_complex()
            or masks.is_complex()
            or (len(labels) and not 0 <= labels.min() <= labels.max() < classes)
        ):
            raise ValueError(f"class_labels {i} must be whole numbers from 0 to {classes - 1}")
    device = images.device
    pairs = zip(class_labels, mask_labels, strict=True)
    return [Objects(labels.to(device, torch.int64), masks.to(device)) for labels, masks in pairs]


def _groups(images, pixel_mask):
    """Indices of the images of each size (H, W)."""
    if not isinstance(pixel_mask, Tensor) or pixel_mask.layout != torch.strided:
        raise TypeError(f"pixel_mask must be a tensor, not {type(pixel_mask).__name__}")
    if pixel_mask.shape != (len(images), *images.shape[2:]):
        wanted = (len(images), *images.shape[2:])
        raise ValueError(f"pixel_mask must have shape (B, H, W) = {wanted}, not {tuple(pixel_mask.shape)}")
    mask, groups = pixel_mask.bool().cpu(), {}
    heights, widths = mask.any(dim=2).sum(dim=1).tolist(), mask.any(dim=1).sum(dim=1).tolist()
    for i, size in enumerate(zip(heights, widths, strict=True)):
        if not mask[i, : size[0], : size[1]].all() or mask[i].sum() != size[0] * size[1]:
            raise ValueError(f"pixel_mask {i} is no rectangle at the top left: pad at the right and bottom only")
        groups.setdefault(size, []).append(i)
    return groups


def _pair(prediction):
    if isinstance(prediction, SegmenterOutput):
        return prediction.class_queries_logits, prediction.masks_queries_logits
    return prediction["class_queries_logits"], prediction["masks_queries_logits"]


def _merged(layer, back, grid_size):
    """One layer's (classes, masks) of each group -> those of the whole batch, in its order, on one grid."""
    masks = []
    for _, m in layer:
        pad = (0, grid_size[1] - m.shape[3], 0, grid_size[0] - m.shape[2])
        masks.append(nn.functional.pad(m, pad, value=OUTSIDE))
    return torch.cat([classes for classes, _ in layer])[back], torch.cat(masks)[back]
