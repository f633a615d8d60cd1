"""Segmentation: data, training and judging of the segmenters."""
