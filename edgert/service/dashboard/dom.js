// Changing the page. All text goes in as text: names and events come from files and programs that nobody has vetted.

export const byId = (id) => document.getElementById(id);

/** An element; `content` is text, or elements. */
export function el(tag, attributes = {}, ...content) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...content.filter((each) => each !== null));
  return node;
}

/** Set a text only where it differs, so that a selection or a screen reader's place is not lost every two seconds. */
export function setText(node, text) {
  const shown = String(text ?? "");
  if (node.textContent !== shown) node.textContent = shown;
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

export function attribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

/** Rebuild what is inside a node, only when `key` has changed. */
const keys = new WeakMap();
export function rebuild(node, key, build) {
  const text = JSON.stringify(key);
  if (keys.get(node) === text) return;
  keys.set(node, text);
  node.replaceChildren(...build());
}

/** [term, text] pairs as a list of definitions; without those whose text is null. */
export function facts(node, pairs) {
  const told = pairs.filter(([, text]) => text !== null);
  rebuild(node, told, () => told.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, String(text)))));
}
