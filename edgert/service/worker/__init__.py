"""A worker's process: one model on one plan, driven over standard input and output (`python -m edgert.service.worker`).

__main__.py     reads the first line, gives up rights (sandbox.py), and then loads device libraries
serving.py      commands in, answers out; between them steps of loop.py
loop.py         which sequences run in the next step; prefixes.py keeps those that the next prompt may share
generation.py   one request: sampler, text, thoughts, grammar.py
loaded.py       the bundle on a plan; plans.py those it can change to, parking.py caches in files
joules.py       energy, shared out to tokens; scheduling.py how much the system should favour this process
"""
