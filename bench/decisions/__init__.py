"""The time of one routing decision."""
