"""Live pictures for notebook 15: sliders beside a picture that answers to clicks. They need a running kernel.

JupyterLab delivers the changes of widgets in a thread of their own, where PyTorch records gradients unless told not to.
"""

import html
from base64 import b64encode
from io import BytesIO

import anywidget
import matplotlib.pyplot as plt
import torch
import traitlets
from ipywidgets import HTML, VBox


class ClickablePicture(anywidget.AnyWidget):
    """A PNG (base64) that says where it was last clicked: (x, y) as shares of its width and height, y down."""

    _esm = """
    function render({ model, el }) {
      const image = document.createElement("img");
      image.style.maxWidth = "100%";
      image.style.cursor = "crosshair";
      const draw = () => { image.src = "data:image/png;base64," + model.get("png"); };
      image.addEventListener("click", (event) => {
        const box = image.getBoundingClientRect();
        model.set("place", [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
        model.save_changes();
      });
      model.on("change:png", draw);
      draw();
      el.appendChild(image);
    }
    export default { render };
    """
    png = traitlets.Unicode().tag(sync=True)
    place = traitlets.List([0.5, 0.5]).tag(sync=True)


def as_base64(figure):
    """Draw a figure as PNG, base64 text, and close it."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return b64encode(buffer.getvalue()).decode()


def live(draw, place=(0.5, 0.5), **sliders):
    """Show sliders above a picture that is drawn anew whenever one is moved or the picture is clicked.

    Parameters
    ----------
    draw : callable
        draw(place, **values) -> Figure, without gradients; ``place`` is the last click as in ``ClickablePicture``. An
        error's message is shown, and the last picture stays: nobody would see a traceback from that thread.
    place : (x, y)
        The first one.
    **sliders : ipywidgets
        Each gives one of ``values``.

    Returns
    -------
    VBox
    """
    picture, message = ClickablePicture(place=list(place)), HTML()

    def redraw(_=None):
        values = {name: slider.value for name, slider in sliders.items()}
        try:
            with torch.no_grad():
                picture.png = as_base64(draw(picture.place, **values))
            message.value = ""
        except ValueError as error:
            message.value = html.escape(str(error))
        except Exception as error:
            message.value = html.escape(f"{type(error).__name__}: {error}")

    for widget, name in (*((slider, "value") for slider in sliders.values()), (picture, "place")):
        widget.observe(redraw, name)
    redraw()
    return VBox([*sliders.values(), message, picture])
