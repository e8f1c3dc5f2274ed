"""A whole host, role by role: `pyinfra @rbee/inventory/ deploys/site.py`, or through `rbee apply inventory/`."""

from deploys.base import base
from deploys.hive import hive
from deploys.queen import queen
from deploys.worker import worker

base()
queen()
hive()
worker()
