"""How long it takes to have a job accepted, which is to have it on the disk."""
