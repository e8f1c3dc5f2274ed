"""The queen: admits every job, asks the routing script, starts workers and relays their answers."""
