"""What train.export writes beside weights: scores, samples, model card."""
