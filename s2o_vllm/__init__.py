"""Training-free sparse prefill attention for stock vLLM.

Importing this package imports neither torch nor Triton: it must stay inert until
``--attention-backend s2o`` asks for it.
"""

from importlib.metadata import version

__version__ = version("s2o-vllm")
