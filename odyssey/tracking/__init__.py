"""Tracking: what is sent to Weights & Biases once a cell or a sweep has ended, by a process of its own."""

from odyssey.tracking.job import TrackedTable, TrackingJob, track

__all__ = ["TrackedTable", "TrackingJob", "track"]
