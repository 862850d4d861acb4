"""``python -m s2o_vllm.cli`` is the console command ``s2o``."""

import sys

from . import main

sys.exit(main())
