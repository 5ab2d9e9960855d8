"""The server as a program of the system: sockets, keys, systemd; serve.py runs all."""
