"""Replay of conversations: several turns, shared prefixes, short and long requests together.

``vllm bench serve`` sends prompts that know nothing of each other. A turn needs the answer of the
turn before, so that the prefix cache holds what a real conversation would have left there.
"""

from .run import replay

__all__ = ["replay"]
