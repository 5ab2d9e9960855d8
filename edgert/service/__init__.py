"""The same models for many local programs, always on: `edgert serve`.

    server process                                        worker process, one a loaded model
    app.py, api/      HTTP as OpenAI speaks it            worker.py      reads commands, reports
    security.py       who may ask                         loop.py        steps: which sequences run next, together
    pool.py           which models are loaded             generation.py  one request: sampler, text, grammar
    workers.py        starts workers, notices their end   prefixes.py    caches that the next prompt may share
    power.py          which plan suits the moment
              └────────────── protocol.py, a line of JSON a message ──────────────┘

The server never loads a device library: it stays small while nothing is loaded, and a driver that dies takes a worker
with it, not the service. contract.py is what the HTTP side knows of all that.
"""
