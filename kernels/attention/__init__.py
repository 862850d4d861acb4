"""Attend to selected tokens, and to summaries of the skipped ones."""
