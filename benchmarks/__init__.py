"""What S2O costs and what it is worth, measured by commands of this repository."""
