"""Training: data, recipes, the loop, evaluation and pictures of AutoFocusFormer.

Commands (each has ``--help``):

=================================  =============================================================
``python -m train.demo``           the demonstration: a segmenter of small digits, in three minutes
``python -m train.demo_classify``  the classifier's demonstration, in two minutes
``python -m train.classify``       train and evaluate a classifier by a config of ``train/configs``
``python -m train.evaluate``       top-1 and top-5 of a checkpoint
``python -m train.show IMAGE``     draw which tokens each stage kept, and the clusters
``python -m train.check_data``     what a segmentation data set holds, and what is wrong with it
``python -m train.segment``        train and evaluate a segmenter by ``train/configs/segmentation``
``python -m train.predict PATH``   segment pictures: overlays and run lengths
``python -m train.export FILE``    make weights that ship in the package of a checkpoint
=================================  =============================================================

Folders, each importing only those before it: ``common`` (errors, processes, output files), ``config`` (what a run is),
``data`` (data sets, transforms, samplers), ``models`` (networks, weights, checkpoints), ``inference`` (predictions of
any picture), ``metrics`` (scores, official result files), ``tasks`` (what classification and segmentation each bring),
``engine`` (the loop); ``visualization``, ``release`` and ``ablation`` serve single commands.
Augmentation is a function of (seed, epoch, image number) alone, so the number of workers changes no result.
"""

import os
import signal
import sys

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    # Read when torch is imported: a thread that waits spins for a moment only, not for milliseconds, which stalls all
    # threads beside other work.
    os.environ["GOMP_SPINCOUNT"] = "100"


def end_quietly(kind, error, trace) -> None:
    """Report an error that nothing caught; Ctrl-C, while a process ends, in a word."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def end_at_once(number, frame) -> None:
    """End the process on Ctrl-C while a command imports: an exception there can be lost in what it interrupts."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if sys.argv[:1] == ["-m"]:  # python -m train.COMMAND, which imports this first
    sys.excepthook = end_quietly
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)  # until common.errors.run_command
