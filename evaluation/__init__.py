"""Trained networks: finished runs, measurements on them, transforms, corruptions, and the page of a run."""
