"""HTTP/1.1 between rbee's own programs: a small threaded server and a kept-alive client.

The queen is not served from here (it is gunicorn and Falcon); hives and workers are, because a hive must stay
within 30 MB and an engine's process must not be patched by gevent.
"""
