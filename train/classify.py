"""Train and evaluate a classifier: ``python -m train.classify --config NAME [--data PATH] [--section.key VALUE ...]``.

On several GPUs: ``torchrun --nproc-per-node 8 -m train.classify ...``; on several machines torchrun's ``--nnodes`` and
``--rdzv-endpoint`` besides. The total batch stays what the config says; each process accumulates what it must.
"""

import sys

from .common.errors import run_command
from .config.loader import load_config
from .engine.command_line import make_parser, prepare
from .engine.loop import train
from .models.checkpoint import KIND


def main(arguments: list[str]) -> int:
    """Run the command."""
    options, overrides = make_parser("train.classify", __doc__).parse_known_args(arguments)
    config = load_config(options.config, overrides)
    run = train(config, prepare(options, config, KIND))
    if run.ranks.first:
        print(f"best top-1 {100 * run.best:.2f} %; checkpoints and log.jsonl in {run.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
