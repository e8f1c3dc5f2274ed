"""The hive: one on every host."""

from pyinfra.api import deploy

from rbee.apply.operations import planned, transaction


@deploy("Hive")
def hive() -> None:
    """Bring this role to what the host's data says."""
    transaction(name="Converge the hive", order=planned().orders.get("hive"))
