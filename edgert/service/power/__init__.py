"""Which plan suits the moment: what the machine says (machine.py), what follows (policy.py), and limits (pace.py)."""
