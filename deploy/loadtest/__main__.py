"""``python -m s2o_vllm.loadtest``."""

import sys

from .cli import main

sys.exit(main())
