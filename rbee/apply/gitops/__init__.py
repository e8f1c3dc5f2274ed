"""Keeps a fleet as a git repository says: fetch, check, plan and apply in a child process, record, heal."""
