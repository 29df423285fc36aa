"""Trained models that come with the package. Each folder is what its training stage wrote, with a model card."""

from pathlib import Path

PEPTIDES = Path(__file__).parent / "peptides"  # transferable flow of peptides, AMBER14 with OBC1 at 310 K
