// A plan as a strip of blocks. Each kind of device has a colour and a pattern; each run is told in words, too.

import { el, rebuild } from "./dom.js";

const KINDS = ["CPU", "GPU", "NPU", "ORT", "SIM"];

/** `GPU.1@f16` is of kind `GPU`. */
function kind(device) {
  const name = /^[A-Z]+/.exec(device)?.[0] ?? "";
  return KINDS.includes(name) ? name.toLowerCase() : "other";
}

/** By configuration: its class, with a number where a kind occurs in several configurations. */
function classes(blocks) {
  const found = new Map();
  const seen = {};
  for (const device of [...new Set(blocks.map((run) => run.device))].sort()) {
    const name = kind(device);
    seen[name] = (seen[name] ?? 0) + 1;
    found.set(device, `dev-${name} shade-${Math.min(seen[name], 3)}`);
  }
  return found;
}

const range = (run) => (run.first === run.last ? `${run.first}` : `${run.first}–${run.last}`);

function words(run) {
  const kinds = Object.entries(run.kinds ?? {}).map(([name, number]) => `${number} ${name}`);
  const which = run.first === run.last ? `block ${run.first}` : `blocks ${run.first} to ${run.last}`;
  return `${which} on ${run.device}${kinds.length ? ` (${kinds.join(", ")})` : ""}`;
}

function phase(name, runs, look) {
  const title = name === "both" ? "prefill and decode" : name;
  const strip = el("div", { class: "strip", role: "img", "aria-label": `${title}: ${runs.map(words).join("; ")}` });
  const legend = el("ul", { class: "legend", "aria-hidden": "true" });
  for (const run of runs) {
    const blocks = run.last - run.first + 1;
    const bar = el("span", { class: `run ${look.get(run.device)}`, title: words(run) });
    bar.style.flexGrow = blocks;
    bar.style.setProperty("--blocks", blocks);
    strip.append(bar);
  }
  for (const device of new Set(runs.map((run) => run.device))) {
    const own = runs.filter((run) => run.device === device).map(range);
    const told = own.length > 4 ? `${own.slice(0, 3).join(", ")}, … ${own.at(-1)}` : own.join(", ");
    legend.append(el("li", {}, el("i", { class: look.get(device) }), `${device} `, el("small", {}, told)));
  }
  return el("div", { class: "phase" }, el("h4", { title }, name), strip, legend);
}

/** Show `ModelStatus.blocks` in a node. */
export function showStrip(node, blocks) {
  rebuild(node, blocks, () => {
    const look = classes(blocks);
    const phases = ["both", "prefill", "decode"].map((name) => [name, blocks.filter((run) => run.phase === name)]);
    return phases
      .filter(([, runs]) => runs.length)
      .map(([name, runs]) => phase(name, runs.toSorted((a, b) => a.first - b.first), look));
  });
}
