// Elements and numbers. Text is always set as text, never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** h("p", {class: "quiet", onclick: f}, "text", child): an element. Names in `style` are set one by one: CSP allows that. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export const count = (value) => whole.format(value);
export const short = (value) => (value < 10000 ? whole.format(value) : compact.format(value));
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** "83.1%"; "–" of nothing. */
export function share(part, all, digits = 0) {
  if (!all) return "–";
  const percent = (100 * part) / all;
  const text = percent.toFixed(digits);
  return `${percent < 100 && Number(text) === 100 ? (100 - 10 ** -digits).toFixed(digits) : text}%`;
}

/** Seconds for people. */
export function time(seconds) {
  const ms = 1000 * seconds;
  if (ms < 0.095) return `${(1000 * ms).toFixed(0)} µs`;
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  return `${seconds < 9.95 ? seconds.toFixed(1) : seconds.toFixed(0)} s`;
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
export const clockTime = (atS) => clock.format(new Date(1000 * atS));

/** What an id is called where there is little room. */
export const brief = (id) => (id.length > 14 ? `${id.slice(0, 12)}…` : id);

export const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
