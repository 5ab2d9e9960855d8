"""What the general route needs to know of transformers beyond its common interface.

states.py       a model's caches as plain tensors, whatever kind of layer they belong to
recurrent.py    recurrences over tokens, in the form that OpenVINO runs as one operation
experts.py      mixtures of experts that compute the chosen experts only
rope.py         rotary embeddings by complex factors, and of frequencies that depend on the sequence's length
sinks.py        attention sinks in OpenVINO's own operation
adaptation.py   code of transformers that cannot be traced as it is: what each case of it says of itself
tracing.py      all of them, in force while a model is traced, and how operations of our own are translated
"""
