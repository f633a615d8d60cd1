"""Pictures of tokens and of predictions."""
