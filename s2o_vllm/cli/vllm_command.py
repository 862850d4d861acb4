"""vLLM's own command under its own name; started by its module it calls itself ``main.py``."""

import sys


def main() -> None:
    """Run ``vllm`` with the words of this process."""
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli import main as vllm

    vllm.main()


if __name__ == "__main__":
    main()
