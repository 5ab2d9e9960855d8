// All of the page but the models: the figures of now, the power policy, quarantine, events.

import { Sparkline } from "./chart.js";
import { attribute, byId, el, facts, rebuild, setText, show } from "./dom.js";
import { UNKNOWN, bytes, clock, figure, joules, percent, provenance, size, span } from "./format.js";

const SHOWN_EVENTS = 200;
const NEWSWORTHY = ["failure", "recovery", "quarantine", "plan", "power", "evict"];
const MODES = {
  saver: "as little energy as possible",
  balanced: "energy and time alike",
  performance: "as fast as possible",
};

/** A sum of what is known; null where one that works does not tell, or none works. */
function total(models, field) {
  const working = models.filter((model) => model.tokens_per_second !== null);
  if (!working.length || working.some((model) => model[field] === null)) return null;
  return working.reduce((sum, model) => sum + model[field], 0);
}

/** The least trustworthy source among those that work. */
function worst(models) {
  const order = ["measured", "estimated", "modelled", "emulated", "unavailable"];
  const found = models.filter((model) => model.tokens_per_second !== null).map((model) => model.energy_provenance);
  return found.length ? order[Math.max(...found.map((name) => order.indexOf(name)))] : undefined;
}

export class Overview {
  constructor() {
    this.speed = new Sparkline(byId("speed-spark"), "Speed", "tok/s");
    this.watts = new Sparkline(byId("watts-spark"), "Power", "W");
  }

  update(status) {
    const { models } = status;
    const speed = total(models, "tokens_per_second");
    const watts = total(models, "watts");
    const source = worst(models);
    const now = performance.now() / 1000;
    this.speed.add(now, speed);
    this.watts.add(now, watts);
    setText(byId("speed"), figure(speed));
    setText(byId("speed-note"), speed === null ? "nothing runs" : "measured");
    setText(byId("watts"), figure(watts));
    setText(byId("token"), figure(watts !== null && speed ? watts / speed : null));
    const note = source === undefined ? "nothing runs" : watts === null ? `unknown: ${provenance(source)[1]}` : source;
    setText(byId("watts-note"), note);
    setText(byId("token-note"), note);
    attribute(byId("tile-watts"), "title", source === undefined ? "" : provenance(source)[1]);
    const running = models.reduce((sum, model) => sum + model.running, 0);
    const waiting = models.reduce((sum, model) => sum + model.waiting, 0);
    setText(byId("running"), running);
    const rejected = status.rejected ? `, ${status.rejected} turned away` : "";
    setText(byId("queue-note"), `${waiting} waiting, of ${status.queue_limit} a model${rejected}`);
    byId("tile-queue").classList.toggle("full", models.some((m) => m.waiting >= status.queue_limit && m.waiting > 0));
    this.#memory(status.memory_bytes, status.memory_limit_bytes);
    setText(byId("about"), `${status.version} · up ${span(status.uptime_s)}`);
    document.title = speed === null ? "edgert" : `${figure(speed)} tok/s – edgert`;
  }

  #memory(used, limit) {
    const [number, unit] = bytes(used);
    setText(byId("memory"), number);
    setText(byId("memory-unit"), unit);
    setText(byId("memory-note"), limit === null ? "no limit" : `of ${size(limit)}`);
    bar(byId("memory-bar"), "Memory", used, limit, `${size(used)} of ${size(limit)}`);
  }
}

/** A bar of a share; nothing where it is not known. */
function bar(node, name, used, limit, text) {
  const known = used !== null && limit > 0;
  show(node, known);
  if (!known) return;
  rebuild(node, name, () => [el("span")]);
  const share = Math.min(1, used / limit);
  node.firstChild.style.width = `${(100 * share).toFixed(1)}%`;
  node.classList.toggle("high", share > 0.9);
  for (const [key, value] of [
    ["role", "meter"], ["aria-label", name], ["aria-valuemin", "0"], ["aria-valuemax", "100"],
    ["aria-valuenow", (100 * share).toFixed(0)], ["aria-valuetext", text],
  ]) attribute(node, key, value);
}

const yes = (value, ifTrue, ifFalse) => (value === null ? UNKNOWN : value ? ifTrue : ifFalse);

export function showPower(power) {
  setText(byId("mode"), power.mode);
  attribute(byId("mode"), "title", MODES[power.mode] ?? "");
  setText(byId("policy"), power.policy === "auto" ? "automatic" : "as set");
  setText(byId("reason"), power.reason);
  const battery = power.battery_share === null ? "" : `, ${percent(power.battery_share)}`;
  facts(byId("power-facts"), [
    ["Power source", yes(power.on_battery, "battery", "mains") + battery],
    ["Slowed by heat", yes(power.throttled, "yes", "no")],
    ["Somebody there", yes(power.user_active, "yes", "no")],
    ["Limit", power.max_watts === null ? "none" : `${figure(power.max_watts)} W`],
    [
      "Last hour",
      power.joules_per_hour === null
        ? joules(power.spent_joules)
        : `${joules(power.spent_joules)} of ${joules(power.joules_per_hour)}`,
    ],
  ]);
}

export function showQuarantine(quarantined) {
  const units = Object.entries(quarantined);
  show(byId("quarantine"), units.length > 0);
  facts(byId("quarantine-list"), units);
}

/** Events, newest first; those of importance are read out once when they come. */
export class Events {
  #last = 0;
  #filled = false;

  get last() {
    return this.#last;
  }

  /** `from`: in any order, those that are known already are left out. */
  add(from) {
    const fresh = from.filter((event) => event.number > this.#last).toSorted((a, b) => a.number - b.number);
    if (!fresh.length) {
      this.#filled = true;
      return;
    }
    this.#last = fresh.at(-1).number;
    const rows = byId("event-rows");
    for (const event of fresh) rows.prepend(row(event));
    while (rows.children.length > SHOWN_EVENTS) rows.lastChild.remove();
    show(byId("no-events"), false);
    show(byId("events-scroll"), true);
    const news = fresh.filter((event) => NEWSWORTHY.includes(event.kind)).at(-1);
    if (news && this.#filled) setText(byId("news"), `${news.kind}: ${news.model ?? "service"}: ${news.detail}`);
    this.#filled = true;
  }

  /** The service was started anew: its events count from 1 again. */
  restart() {
    this.#last = 0;
    byId("event-rows").replaceChildren();
  }

  live(open) {
    setText(byId("events-live"), open ? "live" : "");
  }
}

function row(event) {
  const at = new Date(event.at_s * 1000);
  const stamp = Number.isNaN(at.getTime()) ? "" : at.toISOString();
  return el(
    "tr",
    { "data-kind": event.kind },
    el("td", {}, el("time", { datetime: stamp }, clock(event.at_s))),
    el("td", {}, el("span", { class: "kind" }, event.kind)),
    el("td", {}, event.model ?? "service"),
    el("td", {}, event.detail),
  );
}

export function showLink(state, text) {
  attribute(byId("link"), "data-state", state);
  setText(byId("link-text"), text);
}

