"""Select the tokens with the best scores, within a budget."""
