"""Estimators, free energies, TICA and MSMs, speed and cost, figures and the report."""
