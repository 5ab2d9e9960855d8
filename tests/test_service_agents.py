"""An agent framework's client, where one is installed: `pip install pydantic-ai-slim[openai]`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fake_service import FakeService, words
from pydantic import BaseModel
from served import KEY, serving

from edgert.service.contract import Delta, Request

pydantic_ai = pytest.importorskip("pydantic_ai")


class City(BaseModel):
    name: str
    people: int


def weather(request: Request) -> list[Delta]:
    """Calls the tool, then tells what it said."""
    assert request.messages is not None
    last = request.messages[-1]
    if last["role"] == "tool":
        return words(f"It is {last['content']}.")
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    return words(f"<tool_call>{json.dumps(call)}</tool_call>")


def city(request: Request) -> list[Delta]:
    """The output tool that the framework makes of a class, called as the schema wants it."""
    assert request.constraint is not None
    call = {"name": "final_result", "arguments": {"name": "Oslo", "people": 700000}}
    return words(json.dumps([call]))


def agent(url: str, model: str, **more: Any) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key=KEY)
    return pydantic_ai.Agent(OpenAIChatModel(model, provider=provider), **more)


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_uses_its_tool(stream: bool) -> None:
    service = FakeService({"weather": weather})

    async def main(url: str) -> str:
        asked = agent(url, "weather", instructions="Be brief.")

        @asked.tool_plain  # type: ignore[untyped-decorator]
        def weather(city: str) -> str:
            return f"sunny in {city}"

        if not stream:
            return str((await asked.run("How is the weather in Oslo?")).output)
        async with asked.run_stream("How is the weather in Oslo?") as running:
            return str(await running.get_output())

    with serving(service) as url:
        assert asyncio.run(main(url)) == "It is sunny in Oslo."
    assert len(service.requests) == 2
    assert service.requests[0].messages is not None
    assert service.requests[0].messages[0] == {"role": "system", "content": "Be brief."}


def test_an_agent_gets_the_type_it_asks_for() -> None:
    with serving(FakeService({"city": city})) as url:
        assert asyncio.run(agent(url, "city", output_type=City).run("Oslo")).output == City(name="Oslo", people=700000)
