"""Which models are loaded, in which workers, and whose turn it is.

pool.py         the service as contract.py has it: all models
hosted.py       one model: its worker, what that is told (steering.py), its idleness (idle.py), its end (recovery.py)
desk.py         its requests: who waits (queueing.py), who runs; jobs.py is one request
workers.py      one worker's process: starts it, talks to it, notices when it is silent
room.py         the memory budget, and who is evicted for it
"""
