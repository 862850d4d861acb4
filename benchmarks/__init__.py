"""What S2O costs and what it is worth, measured by commands of this repository.

`speed` times attention, servers and decode; `quality` compares tasks, tokens and outputs with
dense attention; `research` holds baselines and instruments that nothing serves. Result files of
all three are in `results`.
"""
