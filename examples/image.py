"""A question about a picture, to a model that takes images (`docs/models.md` says which do).

python examples/image.py build/model.edge cat.png
"""

import sys

import numpy as np

import edgert

model = edgert.load(sys.argv[1])
if len(sys.argv) > 2:
    picture = sys.argv[2]  # a path; bytes, a Pillow image and an array do as well
else:
    picture = np.full((224, 224, 3), 255, np.uint8)
    picture[60:160, 40:180] = (200, 30, 30)  # a red square on white
content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in this picture?"}]
try:
    answer = model.chat([{"role": "user", "content": content}], max_tokens=60)
except edgert.EdgertError as error:
    print(f"This model cannot answer a question about a picture: {error}")
else:
    t = answer.timings
    print(answer.text)
    print(f"  [{t.prompt_tokens} tokens of prompt, those of the picture among them, in {t.ttft_us / 1000:.0f} ms]")
