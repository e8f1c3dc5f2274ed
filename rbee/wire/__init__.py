"""Every type that crosses a process, or is left on a disk for another process."""
