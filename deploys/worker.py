"""The declared workers, one at a time; those that nobody declares any more end first."""

from pyinfra.api import deploy

from rbee.apply.operations import planned, transaction


@deploy("Worker")
def worker() -> None:
    """Bring this role to what the host's data says."""
    transaction(name="Converge the worker", order=planned().orders.get("worker"))
