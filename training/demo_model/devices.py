"""Import before JAX: one virtual device a core.

XLA's CPU backend runs the elementwise steps of a small network on one thread a device, so a batch spread over two
devices keeps two cores busy.
"""

from __future__ import annotations

import os

COUNT = min(2, os.cpu_count() or 1)

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={COUNT}")
