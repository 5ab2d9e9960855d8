// The service's HTTP interface. The key comes with the page's address, or from the person; it stays in this tab.

const STORED = "edgert-key";
let key = null;

export class KeyError extends Error {}
export class GoneError extends Error {}

/** Take the key out of the address, so that it is in no history and no screenshot. */
export function takeKey() {
  const found = /^#token=(.+)$/.exec(location.hash);
  if (found) {
    let given = found[1];
    try {
      given = decodeURIComponent(given);
    } catch {
      // it was not encoded
    }
    history.replaceState(null, "", location.pathname + location.search);
    setKey(given);
  } else {
    try {
      key = sessionStorage.getItem(STORED);
    } catch {
      key = null;
    }
  }
}

export function setKey(text) {
  key = text;
  try {
    sessionStorage.setItem(STORED, text);
  } catch {
    // storage is turned off: it holds until the page is left
  }
}

export const hasKey = () => key !== null;

/** A request; gives the response if it is 2xx. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  // A header takes ASCII only; anything else is no key, and the service says so.
  if (key !== null && /^[\x20-\x7e]+$/.test(key)) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new GoneError("The service does not answer.");
  }
  if (response.status === 401) throw new KeyError("The service wants its key.");
  if (!response.ok) {
    throw new Error(await message(response));
  }
  return response;
}

export const status = async (signal) => (await ask("/v1/status", { signal })).json();

export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

async function message(response) {
  try {
    const told = (await response.json()).error?.message;
    if (typeof told === "string" && told) return told;
  } catch {
    // no JSON: the number has to do
  }
  return `The service answered ${response.status} ${response.statusText}`.trim();
}
