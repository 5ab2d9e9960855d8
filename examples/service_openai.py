"""OpenAI's client and the service: a stream, an answer in JSON that fits a schema, a tool call.

edgert serve build/demo.edge --port 11535     # then, elsewhere
python examples/service_openai.py demo http://127.0.0.1:11535/v1

The demo model knows no tools; what it writes fits the schema all the same, as tokens that do not fit are never chosen.
"""

import json
import os
import sys
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageFunctionToolCall

model, url = sys.argv[1:]
settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edgert"  # %APPDATA%\edgert on Windows
client = OpenAI(base_url=url, api_key=(settings / "token").read_text().strip())

stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Good evening"}], max_tokens=40, seed=1, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

city = {
    "type": "object",
    "properties": {"city": {"enum": ["London", "Paris"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Where to, and for how long?"}],
    response_format={"type": "json_schema", "json_schema": {"name": "trip", "schema": city, "strict": True}},
)
print("trip:", json.loads(answer.choices[0].message.content or ""))

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Book me a trip."}],
    tools=[{"type": "function", "function": {"name": "book", "description": "Book a trip.", "parameters": city}}],
    tool_choice={"type": "function", "function": {"name": "book"}},
)
for call in answer.choices[0].message.tool_calls or []:
    if isinstance(call, ChatCompletionMessageFunctionToolCall):
        print(f"call: {call.function.name}({call.function.arguments})")
