"""AutoFocusFormer (AFF), the definition: NumPy and SciPy, float64, one algorithm a file.

This package says what AFF computes; it never imports torch and never tries to be quick. ``fast`` computes the same
on any device, and ``parity_tests`` hold the two together. Read the files in the order in which data flows:

    image -> patch_embedding -> [ curves -> clustering -> neighborhoods -> position -> attention
                                  -> grid_prior -> selection -> merging ] x 4 stages -> backbone
    backbone -> [ interpolation -> pointconv, deformable ] -> mask2former -> matching, postprocess
    backbone -> soft_clusters -> hcformer -> matching, postprocess

Source: C. Ziwen et al., "AutoFocusFormer: Image Segmentation off the Grid", CVPR 2023.

Glossary (symbol, meaning, unit, section of the paper):

    B          images in a batch (the reference takes one image at a time)
    H, W       height and width of the image, pixels
    h, w       grid size: of the finest grid, H/4 x W/4 cells, after padding                            sec. 3
    n          tokens of a stage
    p = (x, y) position of a token: integer cells of the finest grid, in every stage                    sec. 3
    f          feature of a token, C channels
    raster     the order by y, then x; it breaks every tie between tokens
    m          cluster size: tokens a cluster                                                           sec. 3.1.1
    k          clusters: ceil(n / m)
    nh, nw     patches down and across; their centres are the anchors of the space-filling curve        Fig. 3
    r          distance to the previous anchor over distance to the next                                Eq. 1
    S, c       integer sum of a cluster's positions, and its count; S / c is its centre
    R          clusters that a token attends to                                                         sec. 3.1.2
    M          slots of a neighbourhood, R m (a slot of a short cluster may be empty: masked)           sec. 3.2
    heads, d   attention heads, and the channels of each: d = C / heads                                 sec. 3.2
    e          expanded relative position (dx, dy, distance, sine, cosine)                              Eq. 5
    blank      a learnt key and value that every neighbourhood shares                                   sec. 4.3
    s          importance of a token, in (0, 1)                                                         sec. 3.3.1
    t          local stride: nearest other token's distance, rounded up to a power of two, cells        sec. 3.3.2
    g          grid prior, 0 or 1                                                                       sec. 3.3.2
    alpha      weight of s beside g when tokens are chosen                                              sec. 3.3.2
    K          tokens kept by a merge: int(n * rate)
    reserved   tokens on the coarse grid of spacing 2^(stage + 1), always kept                          sec. 3.3.2
    W(.)       four merging weights from a relative position                                            Eq. 4
    D          channels of a segmentation head                                                          sec. 4.1
    q          queries, each of which may become one segment
    a          half the power of the distance in Shepard interpolation                                  sec. 4.1
    A          soft assignment of a fine token to merged ones (HCFormer)                                ref. 34
"""
