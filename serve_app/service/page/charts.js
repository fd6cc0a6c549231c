// Predicted against actual cached tokens, and the hottest branches of the prefix tree.

import { h, svg, count, plural, share, short } from "./dom.js";

const SIZE = 300;
const LEFT = 46;
const BOTTOM = 30;

/** One point for each decision that the engine has told of; on the diagonal the prediction was right. */
export function accuracy(decisions) {
  const points = decisions.filter(({ receipt }) => receipt.actual && receipt.prompt_tokens && !receipt.incomplete && receipt.one_sequence !== false);
  if (!points.length) {
    return [empty("Nothing to compare yet", "A point shows when an engine has told how many tokens it took from its cache. "
      + "Replicas of Ray Serve do; others tell by /v1/done, or through Envoy's endpoint picker.")];
  }
  const pairs = points.map(({ receipt }) => [receipt.predicted_cached_tokens ?? 0, receipt.actual.cached_tokens, receipt]);
  const most = nice(Math.max(16, ...pairs.flatMap(([predicted, actual]) => [predicted, actual])));
  const at = (tokens) => (SIZE * tokens) / most;
  const over = pairs.filter(([predicted, actual]) => predicted > actual).length;
  const under = pairs.filter(([predicted, actual]) => predicted < actual).length;
  const exact = pairs.length - over - under;
  return [
    svg("svg", { viewBox: `0 0 ${LEFT + SIZE + 12} ${SIZE + BOTTOM + 12}`, role: "img", class: "scatter",
      "aria-label": `${exact} of ${pairs.length} predictions exact, ${over} too high, ${under} too low` },
      [0, 0.5, 1].flatMap((part) => [
        svg("line", { class: "grid", x1: LEFT, x2: LEFT + SIZE, y1: 6 + SIZE * (1 - part), y2: 6 + SIZE * (1 - part) }),
        svg("text", { x: LEFT - 8, y: 10 + SIZE * (1 - part), "text-anchor": "end" }, short(most * part)),
        part ? svg("text", { x: LEFT + SIZE * part, y: SIZE + 22, "text-anchor": part === 1 ? "end" : "middle" }, short(most * part)) : "",
      ]),
      svg("line", { class: "ideal", x1: LEFT, y1: 6 + SIZE, x2: LEFT + SIZE, y2: 6 }),
      svg("text", { x: LEFT, y: SIZE + BOTTOM + 8, class: "axis" }, "predicted →"),
      svg("text", { x: 12, y: 6 + SIZE, class: "axis", transform: `rotate(-90 12 ${6 + SIZE})` }, "actual →"),
      pairs.map(([predicted, actual, receipt]) => svg("circle", {
        class: predicted === actual ? "exact" : "off", cx: LEFT + at(predicted), cy: 6 + SIZE - at(actual), r: 3.5,
      }, svg("title", {}, `${receipt.request_id}: predicted ${count(predicted)}, actual ${count(actual)}`)))),
    h("dl", { class: "counts" },
      pair("Exact", share(exact, pairs.length), "exact"),
      pair("Too high", share(over, pairs.length), "off"),
      pair("Too low", share(under, pairs.length), "off"),
      pair("Compared", count(pairs.length))),
  ];
}

const pair = (name, value, kind = "") => h("div", { class: kind }, h("dt", {}, name), h("dd", {}, value));

/** The next of 1, 2, 4, 5, 8 times a power of ten. */
function nice(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 4, 5, 8, 10].find((step) => step * unit >= value);
}

/** Beginnings that several of the last prompts share, each below the shorter one that it goes on from. */
export function branches({ branches: found, traffic, fleet }) {
  if (!found.length) {
    return [empty("No beginning is shared yet", "A branch shows when two of the last prompts begin alike, by a block at least.")];
  }
  const depth = [];
  const most = Math.max(...found.map((one) => one.requests));
  return [h("table", { class: "branches" },
    h("thead", {}, h("tr", {},
      h("th", { scope: "col" }, "Tokens"), h("th", { scope: "col", class: "wide" }, "Requests"),
      h("th", { scope: "col", class: "number" }, h("span", { class: "hidden" }, "Share")),
      h("th", { scope: "col" }, "Held by"))),
    h("tbody", {}, found.map((one, i) => {
      depth[i] = one.parent < 0 ? 0 : depth[one.parent] + 1;
      const names = one.holders.slice(0, 3).join(", ");
      return h("tr", {},
        h("th", { scope: "row", style: { "padding-left": `${14 * depth[i]}px` } },
          depth[i] ? h("span", { class: "twig", "aria-hidden": "true" }, "└ ") : null,
          `${short(one.blocks * fleet.block_size)}+`),
        h("td", { class: "wide" }, h("div", { class: "bar", "aria-hidden": "true" },
          h("span", { style: { width: `${(100 * one.requests) / most}%` } }))),
        h("td", { class: "number" }, count(one.requests)),
        h("td", { title: one.holders.join(", ") }, one.holder_count > 3 ? plural(one.holder_count, "replica") : names || h("span", { class: "quiet" }, "nobody")));
    }))),
  h("p", { class: "quiet" }, `Of the last ${plural(traffic.requests, "request")}. Lengths are looked at in powers of two blocks; no text is known here.`)];
}

const empty = (title, text) => h("div", { class: "empty" }, h("h3", {}, title), h("p", {}, text));
