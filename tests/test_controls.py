"""The live pictures of notebook 15, as JupyterLab runs them: changes of a widget arrive in a thread of their own."""

import importlib
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch

pytest.importorskip("anywidget")
pytest.importorskip("ipywidgets")
FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.fixture(scope="module")
def controls():
    """The module beside the notebooks."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("controls")
    finally:
        sys.path.remove(str(FOLDER))


def in_a_thread(change):
    """Make a change as JupyterLab does."""
    thread = Thread(target=change)
    thread.start()
    thread.join()


def drawing(fails=None):
    """A draw function that needs numbers of a parameter, and a list of what it was asked to draw."""
    import matplotlib.figure

    weight, asked = torch.nn.Parameter(torch.ones(2)), []

    def draw(place, m):
        asked.append((list(place), m))
        if fails and m > 1:
            raise fails
        (weight * m).numpy()  # an error where gradients are recorded
        return matplotlib.figure.Figure(figsize=(1, 1))

    return draw, asked


def test_slider_and_click_redraw_from_another_thread(controls):
    ipywidgets = importlib.import_module("ipywidgets")
    draw, asked = drawing()
    slider = ipywidgets.IntSlider(1, min=1, max=4)
    with torch.no_grad():
        box = controls.live(draw, place=(0.25, 0.75), m=slider)
    picture, message = box.children[-1], box.children[-2]
    in_a_thread(lambda: setattr(slider, "value", 3))
    in_a_thread(lambda: setattr(picture, "place", [0.5, 0.125]))
    assert asked == [([0.25, 0.75], 1), ([0.25, 0.75], 3), ([0.5, 0.125], 3)]
    assert message.value == "" and picture.png


@pytest.mark.parametrize("error, said", [(ValueError("rate too small"), "rate too small"), (KeyError("m"), "KeyError")])
def test_error_is_shown_and_goes_with_the_next_picture(controls, error, said):
    ipywidgets = importlib.import_module("ipywidgets")
    draw, _ = drawing(error)
    slider = ipywidgets.IntSlider(1, min=1, max=4)
    box = controls.live(draw, m=slider)
    message = box.children[-2]
    in_a_thread(lambda: setattr(slider, "value", 3))
    assert said in message.value
    in_a_thread(lambda: setattr(slider, "value", 1))
    assert message.value == ""
