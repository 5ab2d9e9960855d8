// The page: asks for the state every two seconds while somebody looks, follows the events, and says when it cannot.

import { GoneError, KeyError, hasKey, setKey, status, takeKey } from "./api.js";
import { byId, setText, show } from "./dom.js";
import { ModelList } from "./models.js";
import { follow } from "./stream.js";
import { Events, Overview, showLink, showPower, showQuarantine } from "./view.js";

const EVERY_MS = 2000;
const LONGEST_MS = 15000;

const overview = new Overview();
const events = new Events();
const models = new ModelList(() => look(), () => askKey(true));
let timer = null; // until the next look
let looking = null; // AbortController of the look that is under way
let stream = null; // AbortController of the events
let failures = 0;
let uptime = 0;

function later(ms) {
  clearTimeout(timer);
  timer = document.visibilityState === "visible" ? setTimeout(look, ms) : null;
}

async function look() {
  clearTimeout(timer);
  looking?.abort();
  const mine = (looking = new AbortController());
  // A service that accepts and never answers is gone, too.
  const limit = setTimeout(() => mine.abort("timeout"), 10000);
  try {
    const found = await status(mine.signal);
    if (mine !== looking) return;
    draw(found);
    later(EVERY_MS);
  } catch (error) {
    if (mine !== looking || (mine.signal.aborted && mine.signal.reason !== "timeout")) return;
    if (error instanceof KeyError) askKey(hasKey());
    else gone(error instanceof GoneError || mine.signal.aborted ? "The service does not answer." : error.message);
  } finally {
    clearTimeout(limit);
  }
}

function draw(found) {
  failures = 0;
  show(byId("banner"), false);
  show(byId("key-form"), false);
  show(byId("main"), true);
  document.body.classList.remove("stale");
  showLink("live", "live");
  if (found.uptime_s < uptime) events.restart();
  uptime = found.uptime_s;
  overview.update(found);
  models.update(found.models);
  showPower(found.power);
  showQuarantine(found.quarantined);
  events.add(found.events);
  if (stream === null) listen();
}

function gone(text) {
  failures += 1;
  const ms = Math.min(LONGEST_MS, 1000 * 2 ** (failures - 1));
  document.body.classList.add("stale");
  showLink("gone", "not connected");
  setText(byId("banner-text"), `${text} Trying again in ${Math.round(ms / 1000)} s.${
    byId("main").hidden ? "" : " What is shown is the last that it said."}`);
  show(byId("banner"), true);
  document.title = "edgert – not connected";
  deaf();
  later(ms);
}

function askKey(wrong) {
  clearTimeout(timer);
  deaf();
  show(byId("banner"), false);
  show(byId("main"), false);
  showLink("locked", "locked");
  const form = byId("key-form");
  show(byId("key-wrong"), wrong);
  if (form.hidden || wrong) {
    show(form, true);
    byId("key").value = "";
    byId("key").focus();
  }
}

/** Follow the events; what is missed comes with the next state, so an end needs no hurry. */
async function listen() {
  const mine = (stream = new AbortController());
  try {
    await follow("/v1/events", mine.signal, events.last, () => events.live(true), (event) => events.add([event]));
  } catch {
    // the next look says what is wrong
  }
  if (stream === mine) {
    events.live(false);
    setTimeout(() => {
      if (stream === mine) stream = null;
    }, 5000);
  }
}

function deaf() {
  stream?.abort();
  stream = null;
  events.live(false);
}

byId("retry").addEventListener("click", look);
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  look();
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") look();
  else {
    clearTimeout(timer);
    deaf();
  }
});
addEventListener("hashchange", () => {
  takeKey();
  look();
});

takeKey();
look();
