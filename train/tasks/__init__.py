"""What classification and segmentation each bring to training."""
