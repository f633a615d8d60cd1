"""Weights into a network: from this project's checkpoints or the official ones."""

from pathlib import Path

from torch import nn

from ..common.errors import UserError, one_line
from .checkpoint import COMMANDS, TRAINED, read_file
from .pretrained import load_state, resolve


def weights_of(state: dict) -> dict:
    """Choose a checkpoint's weights: the averaged ones where there are some."""
    return state.get("ema") or state["model"]


def known_classes(state: dict) -> list[str] | None:
    """Return the names of the classes of a checkpoint's data; None where it has none."""
    vocabulary = state.get("vocabulary")
    return [each["name"] for each in vocabulary["classes"]] if vocabulary else state.get("classes")


def read_official(path: str) -> dict:
    """Read an official checkpoint and rename its keys, never running code from it."""
    import fast.checkpoints

    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        state = fast.checkpoints.load(path)
        return fast.checkpoints.from_official(state)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"official weights {path}: {one_line(error)}") from error


def load_strictly(model: nn.Module, weights: dict, path: str) -> None:
    """Load weights that must fit exactly."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {one_line(error)}") from error


def places_of(wanted: list[str], known: list[str]) -> list[int] | None:
    """Find the classes of some data among those that a classifier knows.

    Parameters
    ----------
    wanted, known : list of str
        Names of the classes, in the order of their numbers.

    Returns
    -------
    list of int or None
        For each class wanted, its number in ``known``; None if the two do not hold the same names, each once.
    """
    if wanted == known:
        return list(range(len(known)))
    if sorted(wanted) != sorted(known) or len(set(known)) < len(known):
        return None
    numbers = {name: number for number, name in enumerate(known)}
    return [numbers[name] for name in wanted]


def other_classes(path, known: list[str], wanted: list[str], advice: str) -> UserError:
    """Return an error: weights know other classes than the data have, naming the first few that differ."""
    both = set(known) & set(wanted)
    odd = [[name for name in names if name not in both][:3] or names[:3] for names in (known, wanted)]
    here, there = (", ".join(map(repr, names)) for names in odd)
    return UserError(
        f"{path} knows classes that the data number or name otherwise: {here} there, {there} here; {advice}"
    )


def renumber(weights: dict, head: str, places: list[int]) -> None:
    """Reorder the rows of a classifier, ``head``.weight and ``head``.bias; rows beyond stay."""
    for key in (f"{head}.weight", f"{head}.bias"):
        rest = range(len(places), len(weights[key]))
        weights[key] = weights[key][[*places, *rest]]


def load_initial(model: nn.Module, path: str, classes: list[str] | None = None) -> None:
    """Start from weights whose classifier may be for other classes; such a one is left as created.

    Parameters
    ----------
    model : Module
        Of ``fast.create_model``.
    path : str
        A checkpoint of train.classify, weights that ship (file or name) or official ones.
    classes : list of str, optional
        Names of the data's classes. If the checkpoint numbers the same names otherwise, its classifier is renumbered.

    Raises
    ------
    UserError
        Unreadable, or misfitting elsewhere than in the classifier.
    """
    path = resolve(path)
    state = read_file(Path(path), needs=TRAINED) if kind_of(path) in COMMANDS else {}
    weights, known = weights_of(state) if state else read_official(path), state.get("classes")
    own, head = model.state_dict(), head_of(model)
    places = places_of(classes, known) if classes and known else []
    for key in (f"{head}.weight", f"{head}.bias"):
        if key in weights and (weights[key].shape != own[key].shape or places is None):
            weights[key] = own[key]
    if places and weights[f"{head}.bias"].shape == (len(places),):
        renumber(weights, head, places)
    load_strictly(model, weights, path)


def head_of(model: nn.Module) -> str:
    """Return the name of a model's classifier."""
    return next(name for name, module in model.named_modules() if module is model.get_classifier())


def kind_of(path: str) -> str | None:
    """Return what a checkpoint of this project calls itself, without running code from it; None for other files."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        kind = load_state(path).get("kind")
        return kind if isinstance(kind, str) else None
    except (ValueError, OSError, ImportError) as error:
        reason = one_line(error)
        raise UserError(reason if str(path) in reason else f"{path}: {reason}") from error
