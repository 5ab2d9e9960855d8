// Server-sent events over fetch: EventSource cannot send the key.

import { ask } from "./api.js";

/** Splits the text of a stream into events: {id, data}. Comments and fields that nobody needs are left out. */
export class Splitter {
  #rest = "";

  push(text) {
    const parts = (this.#rest + text).replaceAll("\r\n", "\n").split("\n\n");
    this.#rest = parts.pop();
    return parts.map(parse).filter((event) => event.data !== "");
  }
}

function parse(block) {
  const data = [];
  let id = null;
  for (const line of block.split("\n")) {
    const [, name, value] = /^([a-z]+):? ?(.*)$/.exec(line) ?? [];
    if (name === "data") data.push(value);
    else if (name === "id") id = value;
  }
  return { id, data: data.join("\n") };
}

/** Calls `each` with every event until the stream ends or `signal` aborts it. */
export async function follow(path, signal, lastId, opened, each) {
  const headers = lastId ? { "Last-Event-ID": String(lastId) } : {};
  const response = await ask(path, { signal, headers: { Accept: "text/event-stream", ...headers } });
  opened();
  const splitter = new Splitter();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    for (const event of splitter.push(value)) {
      let told;
      try {
        told = JSON.parse(event.data);
      } catch {
        continue; // cut off in the middle
      }
      each(told);
    }
  }
}
