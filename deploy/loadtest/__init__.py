"""Load test: stock ``vllm bench serve`` against running servers, at rising request rates."""

from .cli import main

__all__ = ["main"]
