// Figures for people. What is not known is a dash, never 0.

export const UNKNOWN = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** A number with about three digits that say something, e.g. 8.42, 21.3, 147. */
export function figure(value) {
  if (!known(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.001) return value.toExponential(1);
  return value.toFixed(size < 1 ? 3 : size < 10 ? 2 : size < 100 ? 1 : 0);
}

/** Bytes as [number, unit], decimal. */
export function bytes(count) {
  if (!known(count)) return [UNKNOWN, ""];
  let value = count;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return [unit === "B" ? value.toFixed(0) : value.toFixed(1), unit];
    value /= 1000;
  }
  return [value.toFixed(1), "TB"];
}

export const size = (count) => bytes(count).join(" ").trim();

/** Seconds, in the two largest units, e.g. "3 h 12 min". */
export function span(seconds) {
  if (!known(seconds)) return UNKNOWN;
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Joules, in kJ or MJ where there are many. */
export function joules(value) {
  if (!known(value)) return UNKNOWN;
  return value < 1e3 ? `${figure(value)} J` : value < 1e6 ? `${figure(value / 1e3)} kJ` : `${figure(value / 1e6)} MJ`;
}

export const percent = (share) => (known(share) ? `${Math.round(share * 100)} %` : UNKNOWN);

export const count = (value, one, many = `${one}s`) => `${known(value) ? value : UNKNOWN} ${value === 1 ? one : many}`;

/** A time of day; with the date where it was another day. */
export function clock(secondsSince1970, now = new Date()) {
  const at = new Date(secondsSince1970 * 1000);
  if (Number.isNaN(at.getTime())) return UNKNOWN;
  const time = at.toTimeString().slice(0, 8);
  if (at.toDateString() === now.toDateString()) return time;
  const two = (n) => String(n).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${time}`;
}

const TOLD = {
  measured: "measured by counters of this machine",
  estimated: "estimated from declared watts and busy time",
  modelled: "modelled, not measured",
  unavailable: "nothing here counts joules",
  emulated: "a device is emulated, so there are no joules",
};

/** Where a figure comes from: [word, sentence]. */
export const provenance = (name) => (name in TOLD ? [name, TOLD[name]] : [String(name ?? UNKNOWN), ""]);
