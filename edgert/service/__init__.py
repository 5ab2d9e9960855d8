"""The same models for many local programs, always on: `edgert serve`.

    server process                                          worker process, one a loaded model
    daemon/     a program of the system: sockets, systemd   worker/     a model on a plan, and its requests
    api/        HTTP as OpenAI speaks it, who may ask
    dashboard/  what a person sees
    pool/       which models are loaded, whose turn it is
    power/      which plan suits the moment
        └──────────── protocol.py, a line of JSON a message ─────────────┘

The server never loads a device library: it stays small while nothing is loaded, and a driver that dies takes a worker
with it, not the service. contract.py is what api/ and the clients (client.py, wire.py) know of all that.
"""
