"""Integrators, trajectory runners and OpenMM molecular dynamics."""
