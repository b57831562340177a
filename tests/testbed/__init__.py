"""A small Kubernetes on loopback for tests and for playing: control plane, S3 server, node that runs pods as processes.

Everything is built from source once per machine (`binaries`), listens on 127.0.0.1 only, and ends with the process
that started it. `python -m tests.testbed up` starts all of it; the fixtures of `tests/conftest.py` start what a test
asks for.
"""
