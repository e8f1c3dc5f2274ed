"""Measure the queen as a gateway, against nginx, LiteLLM's proxy, and no gateway at all."""
