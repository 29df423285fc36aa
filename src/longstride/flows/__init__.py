"""Invertible maps and conditional flows with exact densities."""
