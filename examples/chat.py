"""A conversation from Python: each turn prefills only what is new.

python examples/chat.py build/demo.edge
"""

import sys

import edgert

model = edgert.load(sys.argv[1])
messages: list[dict[str, str]] = []
for said in ("Good evening, sir. Where have you been?", "And what did you see there?"):
    messages.append({"role": "user", "content": said})
    answer = model.chat(messages, max_tokens=40, temperature=0.7, seed=1)
    messages.append({"role": "assistant", "content": answer.text})
    t = answer.timings
    print(f"> {said}\n{answer.text}\n  [{t.reused_tokens} of {t.prompt_tokens} prompt tokens came from the cache]")
