"""Several generations at once with asyncio; each has a sequence of its own.

python examples/many_at_once.py build/demo.edge
"""

import asyncio
import sys

import edgert


async def main() -> None:
    model = edgert.load(sys.argv[1])
    prompts = ["The sea was", "The king said", "In the morning"]
    results = await asyncio.gather(*(model.agenerate(prompt, max_tokens=24) for prompt in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        print(prompt + result.text.replace("\n", " "))


asyncio.run(main())
