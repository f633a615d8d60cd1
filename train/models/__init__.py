"""Networks made of a config, their weights and checkpoints."""
