"""Stream text, and stop when the sentence is over.

python examples/stream.py build/demo.edge
"""

import sys

import edgert

model = edgert.load(sys.argv[1])
print(model.plan.explain())

stream = model.stream("The old house stood", max_tokens=80, temperature=0.8, top_p=0.95, seed=3)
for piece in stream:
    print(piece.text, end="", flush=True)
    if piece.text.rstrip().endswith((".", "!", "?")):
        stream.close()  # the rest is never computed
print(f"\n{piece.timings.new_tokens} tokens, first after {piece.timings.ttft_us / 1000:.0f} ms")
