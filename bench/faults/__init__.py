"""How long faults of workers and hives, and too much load, are felt by clients."""
