"""Turn the machines a person owns into one OpenAI-compatible AI service."""

__version__ = "0.1.0"
