"""Attend to the own segment and to selected tokens."""
