"""Baselines, written from their papers, on the interface of our own methods."""
