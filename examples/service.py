"""Talk to a running service with edgert's own clients, which find its socket by themselves.

edgert serve build/demo.edge     # or `edgert service install --now build/demo.edge`; then, elsewhere
python examples/service.py demo
"""

import asyncio
import sys

import edgert


def one_by_one(model: str) -> None:
    with edgert.Client() as client:
        answer = client.chat(model, "Good evening, sir. Where have you been?", max_tokens=40, seed=1)
        print(answer.text)
        used = answer.usage["edgert"]  # times, and joules with where they come from: None where nobody can measure
        print(f"  [{answer.usage['completion_tokens']} tokens in {used['decode_ms']:.0f} ms, joules: {used['joules']}]")

        for part in client.stream(model, "The old house stood", max_tokens=60, temperature=0.8, seed=3):
            print(part.text, end="", flush=True)
            if part.text.rstrip().endswith("."):
                break  # the service is told, and computes no more
        print()

        try:
            client.generate("no-such-model", "Once")
        except edgert.EdgertError as error:  # the errors that the engine itself raises
            print(f"{type(error).__name__}: {error}")


async def at_once(model: str) -> None:
    """The service decodes several texts in one step where the device gains from it."""
    async with edgert.AsyncClient() as client:
        prompts = ["The sea was", "The king said", "In the morning"]
        answers = await asyncio.gather(*(client.generate(model, p, max_tokens=16, temperature=0) for p in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            print(prompt + answer.text.replace("\n", " "))


one_by_one(sys.argv[1])
asyncio.run(at_once(sys.argv[1]))
