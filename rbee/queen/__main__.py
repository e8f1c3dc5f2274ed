"""`python -m rbee.queen run`: the queen's process."""

# Nothing may be imported before this: gevent replaces what other modules would have taken.
from gevent import monkey

monkey.patch_all()

from rbee.queen.server import main  # noqa: E402

if __name__ == "__main__":
    main()
