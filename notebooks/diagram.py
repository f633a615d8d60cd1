"""The network as boxes and arrows, for notebook 00. Sizes are those of a configuration and a grid size; numbers in
brackets are the notebooks that open a box."""

import drawing
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

STEP = "#D7E9F7"  # learnt: pale blue
RULE = "#FCE8C8"  # a rule on positions, nothing learnt: pale orange
DATA = "#F2F2F2"  # what passes through: grey
NONE = drawing.MARK  # a dashed arrow: no gradient


def box(axes, x, y, text, colour=STEP, width=16, height=14):
    """Draw a box round (x, y) and return its middle and half sizes, for ``arrow``."""
    corner = (x - width / 2, y - height / 2)
    style = {"boxstyle": "round,pad=0,rounding_size=1.5", "facecolor": colour, "edgecolor": "0.3", "linewidth": 0.8}
    axes.add_patch(FancyBboxPatch(corner, width, height, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, linespacing=1.25)
    return x, y, width / 2, height / 2


def arrow(axes, start, end, gradient=True):
    """Draw an arrow from the edge of a box to the edge of another; dashed if no gradient comes back along it."""
    (x0, y0, w0, h0), (x1, y1, w1, h1) = start, end
    if abs(y1 - y0) >= h0 + h1:  # one above the other
        y0, y1 = (y0 + h0, y1 - h1) if y1 > y0 else (y0 - h0, y1 + h1)
    else:
        x0, x1 = (x0 + w0, x1 - w1) if x1 > x0 else (x0 - w0, x1 + w1)
    colour, line = ("0.25", "-") if gradient else (NONE, (0, (3, 2)))
    style = {"arrowstyle": "-|>", "color": colour, "linestyle": line, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x1, y1), (x0, y0), arrowprops=style)


def detour(axes, x0, y0, x1, above, y1):
    """Draw a line from (x0, y0) up to ``above``, across, and an arrow down to (x1, y1)."""
    axes.plot([x0, x0, x1], [y0, above, above], color="0.25", linewidth=1.1)
    axes.annotate("", (x1, y1), (x1, above + 0.3), arrowprops={"arrowstyle": "-|>", "color": "0.25", "shrinkB": 0})


def panel(axes, title, width=100, height=60):
    """Prepare axes for boxes: x from 0 to width, y from 0 (below) to height."""
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")


def draw_stages(axes, counts, config):
    """The backbone: embedding, four stages, three merges, classifier."""
    panel(axes, "Backbone (Fig. 2 of the paper)", 200, 34)
    last = box(axes, 9, 22, "picture", DATA, 14, 16)
    step = box(axes, 30, 22, "embed\n[01]", STEP, 16, 16)
    arrow(axes, last, step)
    for i, (n, channels, depth) in enumerate(zip(counts, config.dims, config.depths, strict=True)):
        stage = box(axes, 55 + 37 * i, 22, f"stage {i + 1}\n{n:,} x {channels}\n{depth} blocks", STEP, 21, 20)
        arrow(axes, step, stage)
        feature = box(axes, 55 + 37 * i, 4, f"norm: res{i + 2}", DATA, 21, 7)
        arrow(axes, stage, feature)
        if i < 3:
            step = box(axes, 73.5 + 37 * i, 22, "choose\nmerge\n[06, 07]", STEP, 13, 18)
            arrow(axes, stage, step)
    classes = box(axes, 189, 22, "norm\nmean\nlinear:\nclasses", STEP, 14, 22)
    arrow(axes, stage, classes)


def draw_block(axes):
    """One transformer block, with what it takes from the geometry."""
    panel(axes, "A stage: clusters once, then blocks")
    tokens = box(axes, 8, 42, "tokens\nn x C", DATA, 14, 12)
    places = box(axes, 8, 12, "positions\n(x, y)", DATA, 14, 12)
    clusters = box(axes, 32, 12, "curve, clusters\nof m [02, 03]", RULE, 24, 13)
    near = box(axes, 61, 12, "R nearest:\nM neighbours [04]", RULE, 26, 13)
    offset = box(axes, 88, 12, "e, Eq. 5\n[05]", RULE, 16, 13)
    norm = box(axes, 23, 42, "norm", STEP, 10, 12)
    attention = box(axes, 44, 42, "attention, P,\nblank token\n[05]", STEP, 23, 17)
    plus = box(axes, 62, 42, "+", DATA, 6, 9)
    perceptron = box(axes, 78, 42, "norm\nMLP", STEP, 14, 15)
    out = box(axes, 94, 42, "+", DATA, 6, 9)
    for start, end in ((tokens, norm), (norm, attention), (attention, plus), (plus, perceptron), (perceptron, out)):
        arrow(axes, start, end)
    for start, end in ((places, clusters), (clusters, near), (near, offset)):
        arrow(axes, start, end, gradient=False)
    arrow(axes, near, (46, 42, 11.5, 8.5), gradient=False)
    arrow(axes, offset, (52, 42, 1, 8.5), gradient=False)
    for x0, y0, x1, y1 in ((8, 48, 61, 57), (67.5, 42, 94, 53)):  # residual connections
        detour(axes, x0, y0, x1, y1, 46.5)


def draw_merge(axes):
    """The end of a stage: score, choice, Eq. 4."""
    panel(axes, "Choosing and merging (Fig. 4)")
    tokens = box(axes, 9, 46, "tokens f\nn x C", DATA, 16, 13)
    places = box(axes, 9, 12, "positions", DATA, 16, 11)
    score = box(axes, 36, 46, "importance\ns [06]", STEP, 21, 13)
    prior = box(axes, 36, 12, "local stride t,\nprior g [06]", RULE, 22, 13)
    choose = box(axes, 66, 12, "keep K: reserved,\nthen best g + alpha s", RULE, 31, 13)
    total = box(axes, 66, 46, "sum of s W f\nof the M neighbours\nEq. 4 [07]", STEP, 28, 17)
    linear = box(axes, 92, 46, "norm\nU", STEP, 12, 13)
    after = box(axes, 92, 12, "K x C'", DATA, 13, 11)
    for start, end in ((tokens, score), (score, total), (total, linear), (linear, after)):
        arrow(axes, start, end)
    for start, end in ((places, prior), (prior, choose), (choose, total), ((38, 46, 10, 6.5), (60, 12, 15, 6.5))):
        arrow(axes, start, end, gradient=False)
    detour(axes, 9, 52.5, 66, 58, 54.5)


def draw_mask2former(axes):
    """Pixel decoder and query decoder."""
    panel(axes, "Mask2Former on points [09]", height=58)
    levels = box(axes, 10, 45, "res5, res4,\nres3", DATA, 18, 13)
    fine = box(axes, 10, 13, "res2: every\ncell", DATA, 18, 13)
    mixed = box(axes, 38, 45, "6 x deformable\nattention", STEP, 25, 13)
    features = box(axes, 38, 13, "Shepard, PointConv:\nmask features", STEP, 29, 13)
    decoder = box(axes, 70, 45, "9 x masked attention,\nself-attention, MLP", STEP, 31, 15)
    queries = box(axes, 93, 45, "q\nqueries", DATA, 12, 13)
    masks = box(axes, 70, 13, "masks = embedding\nx mask features", STEP, 28, 13)
    box(axes, 93, 13, "classes", STEP, 12, 13)
    pairs = [(levels, mixed), (fine, features), (mixed, features), (mixed, decoder), (queries, decoder)]
    pairs += [(features, masks), ((68, 45, 15, 7.5), (68, 13, 14, 6.5)), ((80, 45, 5, 7.5), (92, 13, 6, 6.5))]
    for start, end in pairs:
        arrow(axes, start, end)
    arrow(axes, (76, 13, 5, 6.5), (76, 45, 5, 7.5), gradient=False)


def draw_hcformer(axes):
    """Query decoder on the last stage, masks that climb."""
    panel(axes, "HCFormer on points [10]", height=58)
    last = box(axes, 11, 45, "res5: the last\nstage's tokens", DATA, 20, 13)
    decoder = box(axes, 44, 45, "masked attention,\nself-attention, MLP", STEP, 29, 15)
    queries = box(axes, 72, 45, "q queries", DATA, 16, 11)
    masks = box(axes, 22, 13, "masks on its\ntokens", STEP, 20, 13)
    climb = box(axes, 56, 13, "climb three times: A of\nmerge 3, 2, 1", STEP, 33, 13)
    grid = box(axes, 89, 13, "masks on\nevery cell", DATA, 18, 13)
    classes = box(axes, 93, 45, "classes", STEP, 13, 11)
    merged = box(axes, 62, 30, "features before and after each merge", DATA, 46, 8)
    pairs = [(last, decoder), (queries, decoder), ((30, 45, 6, 7.5), masks), (masks, climb), (climb, grid)]
    for start, end in [*pairs, (merged, climb)]:
        arrow(axes, start, end)
    detour(axes, 40, 52.5, classes[0], 57, 50.5)


def draw_network(image, stages, config):
    """Draw the whole network.

    Parameters
    ----------
    image : (H, W, 3) uint8 array
    stages : list of four (n, 2) arrays
        Positions of each stage's tokens on that image, for the pictures on top.
    config : fast.Config

    Returns
    -------
    Figure
    """
    figure = plt.figure(figsize=(10, 10))
    rows = figure.add_gridspec(4, 1, height_ratios=(2.1, 1.9, 2.7, 2.7))
    for i, axes in enumerate(rows[0].subgridspec(1, 5).subplots()):
        if i == 0:
            drawing.show_photo(axes, image, "picture")
        else:
            title = f"stage {i}: {len(stages[i - 1]):,} tokens"
            drawing.show_tokens(axes, image, stages[i - 1], size=1 + i * i, fade=0.6, colour=drawing.OKABE_ITO[4])
            axes.set_title(title, fontsize=9)
    draw_stages(figure.add_subplot(rows[1]), [len(tokens) for tokens in stages], config)
    left, right = rows[2].subgridspec(1, 2).subplots()
    draw_block(left), draw_merge(right)
    left, right = rows[3].subgridspec(1, 2).subplots()
    draw_mask2former(left), draw_hcformer(right)
    kinds = [plt.Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="0.3") for c in (STEP, RULE, DATA)]
    kinds += [plt.Line2D([], [], color="0.25"), plt.Line2D([], [], color=NONE, linestyle="--")]
    names = ["learnt", "a rule on positions", "data", "gradient comes back", "no gradient comes back"]
    figure.legend(kinds, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
