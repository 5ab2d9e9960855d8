"""Which models are loaded, in which workers, and whose turn it is.

pool.py         the service as contract.py has it: all models
hosted.py       one model: its worker, its plan, its idleness (rest.py, idle.py), its end (recovery.py, quarantine.py)
desk.py         its requests: who waits (queueing.py), who runs; jobs.py is one request
workers.py      one worker's process: starts it, talks to it, notices when it is silent
room.py         the memory budget, and who is evicted for it; footprint.py what there is
"""
