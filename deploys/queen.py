"""The queen, on the host whose inventory block has a QueenPort."""

from pyinfra.api import deploy

from rbee.apply.operations import planned, transaction


@deploy("Queen")
def queen() -> None:
    """Bring this role to what the host's data says."""
    transaction(name="Converge the queen", order=planned().orders.get("queen"))
