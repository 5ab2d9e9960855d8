"""Place attention and FFN blocks on different device configurations, and see that the text stays the same.

python examples/placement.py build/demo.edge
"""

import sys

import edgert

bundle = sys.argv[1]
whole = edgert.load(bundle, device="CPU@f32")
# SIM is a simulated device: right results, no speed. On a machine with a GPU, say GPU@f16.
split = edgert.load(bundle, place="attention=CPU@f32,ffn=SIM@f32")
print(split.plan.explain())

prompt = "She looked out of the window and"
texts = [model.generate(prompt, max_tokens=40).text for model in (whole, split)]
print(prompt + texts[0])
print("the same text" if texts[0] == texts[1] else f"different: {texts[1]}")
