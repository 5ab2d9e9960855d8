// The list of models: one card each, changed in place so that the focus stays where it is.

import { KeyError, post } from "./api.js";
import { attribute, byId, el, facts, setText, show } from "./dom.js";
import { UNKNOWN, count, figure, provenance, size, span } from "./format.js";
import { showStrip } from "./strip.js";

const STATES = {
  unloaded: "not loaded",
  loading: "loading …",
  ready: "ready",
  idle: "idle",
  parked: "parked",
  recovering: "recovering …",
  failed: "failed",
};
const AWAY = ["unloaded", "failed"];

function unloads(model) {
  if (model.pinned) return "never by itself";
  if (model.unload_in_s !== null) return `in ${span(model.unload_in_s)}`;
  return model.running + model.waiting > 0 ? "not while it works" : "never by itself";
}

class Card {
  constructor(name, reload, refused) {
    Object.assign(this, { name, reload, refused, waiting: false });
    this.title = el("h3", {}, name);
    this.state = el("span", { class: "state" });
    this.pinned = el("span", { class: "tag" }, "pinned");
    this.restarts = el("span", { class: "tag warn" });
    this.plan = el("p", { class: "plan faint" });
    this.strip = el("div", { class: "strips" });
    this.figures = Object.fromEntries(
      [["speed", "tok/s"], ["watts", "W"], ["token", "J/token"]].map(([key, unit]) => {
        const number = el("b", {}, UNKNOWN);
        const source = el("small", { class: "source" });
        return [key, { number, source, node: el("p", {}, number, ` ${unit} `, source) }];
      }),
    );
    this.numbers = el("div", { class: "figures" }, ...Object.values(this.figures).map((f) => f.node));
    this.facts = el("dl", { class: "facts" });
    this.warnings = el("ul", { class: "warnings" });
    this.problem = el("p", { class: "wrong", role: "alert", hidden: "" });
    this.load = this.#button("Load", () => this.#send("load", {}));
    this.unload = this.#button("Unload", () => this.#send("unload", {}));
    this.pin = this.#button("Pin", () => this.#send("load", { pin: !this.isPinned }));
    this.node = el(
      "article",
      { class: "card model" },
      el("div", { class: "head" }, this.title, this.state, this.pinned, this.restarts,
        el("div", { class: "buttons" }, this.load, this.pin, this.unload)),
      this.problem, this.warnings, this.plan, this.strip, this.numbers, this.facts,
    );
  }

  #button(verb, act) {
    const button = el("button", { type: "button" }, verb);
    button.addEventListener("click", () => {
      if (!this.waiting) act();
    });
    return button;
  }

  async #send(verb, more) {
    const had = document.activeElement;
    this.waiting = true;
    this.#pending();
    show(this.problem, false);
    try {
      await post(`/v1/models/${verb}`, { model: this.name, ...more });
    } catch (error) {
      if (error instanceof KeyError) this.refused();
      setText(this.problem, error.message);
      show(this.problem, true);
    }
    this.waiting = false;
    this.#pending();
    await this.reload();
    // The button that was pressed may have gone, and the focus with it: it goes to the one in its place.
    if (had?.hidden && document.activeElement === document.body) (this.load.hidden ? this.unload : this.load).focus();
  }

  #pending() {
    for (const button of [this.load, this.pin, this.unload]) attribute(button, "aria-disabled", String(this.waiting));
    attribute(this.node, "aria-busy", String(this.waiting));
  }

  update(model) {
    const away = AWAY.includes(model.state);
    this.isPinned = Boolean(model.pinned);
    this.away = away;
    this.node.classList.toggle("away", away);
    const busy = model.running > 0;
    setText(this.state, busy && model.state === "ready" ? "working" : (STATES[model.state] ?? model.state));
    attribute(this.state, "data-state", busy && model.state === "ready" ? "working" : model.state);
    show(this.pinned, this.isPinned);
    show(this.restarts, model.restarts > 0);
    setText(this.pin, this.isPinned ? "Unpin" : "Pin");
    setText(this.restarts, count(model.restarts, "restart"));
    show(this.load, away);
    show(this.unload, !away);
    show(this.pin, !away);
    for (const button of [this.load, this.unload, this.pin]) {
      attribute(button, "aria-label", `${button.textContent} ${model.name}`);
    }
    show(this.plan, !away && Boolean(model.plan));
    setText(this.plan, `Plan: ${model.plan}`);
    show(this.strip, !away && model.blocks.length > 0);
    showStrip(this.strip, model.blocks);
    show(this.numbers, !away && (model.running > 0 || model.tokens_per_second !== null));
    this.#figure("speed", model.tokens_per_second, model.tokens_per_second === null ? null : "measured");
    this.#figure("watts", model.watts, model.energy_provenance);
    this.#figure("token", model.joules_per_token, model.energy_provenance);
    show(this.facts, !away);
    facts(this.facts, [
      ["Requests", `${model.running} running, ${model.waiting} waiting`],
      ["Memory", model.memory_bytes === null ? UNKNOWN : size(model.memory_bytes)],
      ["KV caches", model.kv_bytes === null ? UNKNOWN : size(model.kv_bytes)],
      ["Context", model.context_length === null ? UNKNOWN : `${model.context_length} tokens`],
      ["Loaded for", span(model.loaded_s)],
      ["Unloads", unloads(model)],
    ]);
    const warnings = model.warnings ?? [];
    show(this.warnings, warnings.length > 0);
    this.warnings.replaceChildren(...warnings.map((text) => el("li", {}, text)));
  }

  #figure(key, value, source) {
    const { number, source: node } = this.figures[key];
    setText(number, figure(value));
    const [word, sentence] = value === null && source !== "emulated" ? ["unknown", ""] : provenance(source);
    setText(node, word);
    attribute(node, "title", value === null ? provenance(source ?? "unavailable")[1] : sentence);
  }
}

export class ModelList {
  #cards = new Map();

  /** `reload`: after a button has done its work. `refused`: the key was not right. */
  constructor(reload, refused) {
    Object.assign(this, { reload, refused, list: byId("model-list") });
  }

  update(models) {
    const names = new Set(models.map((model) => model.name));
    for (const [name, card] of this.#cards) {
      if (!names.has(name)) {
        card.node.remove();
        this.#cards.delete(name);
      }
    }
    for (const model of models) {
      if (!this.#cards.has(model.name)) {
        const card = new Card(model.name, this.reload, this.refused);
        this.#cards.set(model.name, card);
        this.list.append(card.node);
      }
      this.#cards.get(model.name).update(model);
    }
    this.#sort(models);
    const loaded = models.filter((model) => !AWAY.includes(model.state)).length;
    setText(byId("models-count"), models.length ? `${loaded} of ${models.length} loaded` : "");
    show(byId("no-models"), models.length === 0);
  }

  /** Loaded ones first. Not while the focus is among them: moving a node takes the focus away. */
  #sort(models) {
    if (this.list.contains(document.activeElement)) return;
    const cards = models.map((model) => this.#cards.get(model.name));
    const wanted = [...cards.filter((card) => !card.away), ...cards.filter((card) => card.away)];
    if (wanted.some((card, i) => this.list.children[i] !== card.node)) {
      this.list.replaceChildren(...wanted.map((card) => card.node));
    }
  }
}
