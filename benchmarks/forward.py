"""Time and memory of a forward pass on the CPU, beside timm's Swin-Tiny.

    python -m benchmarks.forward                # make bench

The golden vectors are checked first: no figure is printed for a model that computes something else. Times alternate
between the two models in one process; memory is the peak of a process that does nothing else.
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time

SWIN = "swin_tiny_patch4_window7_224"


def make(name):
    """Return an evaluation-mode model by name: ours, or timm's."""
    if name.startswith("aff_"):
        import fast

        return fast.create_model(name).eval()
    import timm

    return timm.create_model(name).eval()


def seconds(model, images):
    """Return the time of one forward pass."""
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def compare(name, size, batch, rounds):
    """Print the medians of ``rounds`` alternating forward passes of ``name`` and Swin-Tiny, their spread and ratio."""
    import torch

    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours, theirs = make(name), make(SWIN)
    with torch.inference_mode():
        ours(images), theirs(images)
        times = [(seconds(ours, images), seconds(theirs, images)) for _ in range(rounds)]
    for label, column in ((name, 0), (SWIN, 1)):
        values = sorted(t[column] for t in times)
        print(f"{label}, {size} x {size}, batch {batch}: median {statistics.median(values):.3f} s", end=" ")
        print(f"({values[0]:.3f} to {values[-1]:.3f} in {rounds})")
    ratio = statistics.median(a / b for a, b in times)
    print(f"ratio of times, median of pairs: {ratio:.2f}")


def peak_memory(name, size, batch):
    """Run one forward pass in this process and print its time and the process's peak resident memory."""
    import torch

    images = torch.randn(batch, 3, size, size)
    with torch.inference_mode():
        took = seconds(make(name), images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**3 if sys.platform == "darwin" else 1024**2)
    print(f"{name}, {size} x {size}, batch {batch}: peak memory {peak:.2f} GiB (first pass {took:.1f} s)", flush=True)


def main():
    """Check, then measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", nargs=3, metavar=("NAME", "SIZE", "BATCH"), help="only the memory of one pass")
    options = parser.parse_args()
    if options.memory:
        name, size, batch = options.memory
        return peak_memory(name, int(size), int(batch))
    if subprocess.call([sys.executable, "-m", "pytest", "-q", "--no-summary", "parity_tests/test_golden.py"]):
        sys.exit("error: the golden vectors are not reproduced; nothing was timed")
    import timm
    import torch

    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        end=", ",
    )
    print(f"timm {timm.__version__}, commit {commit()}")
    compare("aff_mini", 224, 4, options.rounds)
    for case in (("aff_mini", "224", "4"), ("aff_mini", "1024", "1")):
        subprocess.run([sys.executable, "-m", "benchmarks.forward", "--memory", *case], check=True)


def commit():
    """Return the short hash of the checked-out commit, or a word that says there is none."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
