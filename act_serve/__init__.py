"""One base model on vLLM plus many abilities, chosen and composed for every single request."""

__version__ = "0.1.0"
