"""Training rooms: data, recipes, the loop, evaluation and pictures of AutoFocusFormer.

Commands (each has ``--help``):

================================  ==============================================================
``python -m train.classify``      train and evaluate a classifier by a config of ``train/configs``
``python -m train.evaluate``      top-1 and top-5 of a checkpoint
``python -m train.show IMAGE``    draw which tokens each stage kept, and the clusters
``python -m train.demo``          the five-minute demonstration behind ``make demo``
================================  ==============================================================

Files, in reading order: ``config`` (what a run is), ``data`` and ``shards`` (where images come from), ``batches``
(in which order), ``build`` (model, optimiser, schedule), ``engine`` (the loop), ``checkpoint`` (what survives a kill).
Augmentation is a function of (seed, epoch, image number) alone, so the number of workers changes no result.
"""
