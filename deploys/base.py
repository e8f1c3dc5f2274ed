"""What every host has: the user, folders, the release, its models, and the units that bind the others together."""

from pyinfra.api import deploy

from rbee.apply.operations import models, packages, planned, transaction


@deploy("Base")
def base() -> None:
    """Bring this role to what the host's data says."""
    plan = planned()
    packages(name="Send the release", sent=plan.packages)
    models(name="Send models", uploads=plan.uploads)
    transaction(name="Prepare the host", order=plan.orders.get("base"))
