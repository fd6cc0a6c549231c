// The stream of decisions, and one of them explained: each replica's cost, what came of it, the conversation's way.

import { h, brief, clockTime, count, plural, share, sum, time } from "./dom.js";
import { TERMS, candidates, why } from "./why.js";

const ROWS = 8;
const TURNS = 12;

/** The list. Args: select(request id) is called when a person picks one. */
export function stream(decisions, selected, select) {
  return decisions.map(({ receipt, id }) => {
    const chosen = receipt.request_id === selected;
    const prompt = receipt.prompt_tokens;
    const cached = receipt.actual?.cached_tokens ?? receipt.predicted_cached_tokens ?? 0;
    return h("li", {},
      h("button", {
        type: "button", "data-id": receipt.request_id, "aria-current": chosen ? "true" : false,
        onclick: () => select(receipt.request_id),
      },
        h("span", { class: "at" }, clockTime(receipt.at_s)),
        h("span", { class: "to" }, receipt.chosen),
        h("span", { class: "hit", "data-outcome": receipt.outcome }, prompt ? share(cached, prompt) : receipt.outcome),
        meter(prompt ? cached / prompt : 0, !id)));
  });
}

function meter(part, open) {
  return h("span", { class: open ? "meter open" : "meter", "aria-hidden": "true" },
    h("span", { style: { width: `${100 * Math.min(part, 1)}%` } }));
}

/** The explanation. Args: turns: decisions of its conversation, the oldest first. */
export function explanation(decision, turns, all, toggleAll) {
  const { receipt } = decision;
  const said = why(receipt);
  return [
    h("p", { class: "kicker" },
      chip(receipt.outcome), ` ${brief(receipt.request_id)} at ${clockTime(receipt.at_s)}, decided in ${time(receipt.decision_s)}`),
    h("h2", { class: "headline" }, parts(said.head)),
    ...said.lines.map((line) => h("p", { class: "because" }, parts(line))),
    costs(receipt, all, toggleAll),
    outcome(receipt),
    way(turns, receipt.request_id),
  ];
}

const chip = (outcome) => h("span", { class: "chip", "data-outcome": outcome }, outcome);
const parts = (said) => said.map((part) => (typeof part === "string" ? part : h("strong", {}, part.pod)));

// -- costs ------------------------------------------------------------------------------------------------------------

function costs(receipt, all, toggleAll) {
  const rows = candidates(receipt);
  if (!rows.length) return null;
  const heldMost = rows.reduce((best, row) => (row.held > best.held ? row : best), rows[0]);
  const shown = all ? rows : rows.filter((row, i) => i < ROWS || row === heldMost || row.pod === receipt.chosen);
  const most = Math.max(...shown.map((row) => row.total ?? 0));
  const hidden = rows.length - shown.length;
  const beyond = receipt.others ?? 0;
  return h("div", { class: "costs" },
    h("table", {},
      h("caption", {}, most ? "Cost of the request at each replica" : "What each replica holds of the prompt"),
      h("thead", {}, h("tr", {},
        h("th", { scope: "col" }, "Replica"), h("th", { scope: "col", class: "number" }, "Holds"),
        h("th", { scope: "col", class: "wide" }, h("span", { class: "hidden" }, "Terms")),
        h("th", { scope: "col", class: "number" }, most ? "Cost" : ""))),
      h("tbody", {}, shown.map((row) => costRow(row, receipt, most)))),
    hidden || all ? h("button", { type: "button", class: "more", onclick: toggleAll },
      all ? "Show fewer" : `Show ${count(hidden)} more`) : null,
    beyond ? h("p", { class: "quiet" }, `${plural(beyond, "replica")} more, dearer and alike, are not in the receipt.`) : null,
    most ? legend(shown) : null);
}

function costRow(row, receipt, most) {
  const terms = TERMS.filter((term) => row.cost[term.name] > 0);
  const said = terms.map((term) => `${term.label} ${time(row.cost[term.name])}`).join(", ") || "nothing";
  const tiers = Object.entries(row.matched).map(([tier, tokens]) => `${count(tokens)} in ${tier}`).join(", ");
  return h("tr", { class: row.pod === receipt.chosen ? "chosen" : "" },
    h("th", { scope: "row" }, row.pod, row.pod === receipt.chosen ? h("span", { class: "hidden" }, " (chosen)") : null),
    h("td", { class: "number", title: tiers || "nothing" }, row.held ? count(row.held) : "–"),
    h("td", { class: "wide" }, row.total === null ? null : h("div", { class: "bar", role: "img", "aria-label": said, title: said },
      terms.map((term) => h("span", {
        "data-term": term.label, style: { width: `${(100 * row.cost[term.name]) / most}%` },
      })))),
    h("td", { class: "number" }, row.total === null ? "" : time(row.total)));
}

function legend(rows) {
  const used = TERMS.filter((term) => rows.some((row) => (row.cost[term.name] ?? 0) > 0));
  const group = (own, title) => {
    const terms = used.filter((term) => term.own === own);
    return terms.length ? h("div", {},
      h("p", {}, title),
      h("ul", {}, terms.map((term) => h("li", {},
        h("span", { class: "swatch", "data-term": term.label }), h("b", {}, term.label), ` ${term.text}`)))) : null;
  };
  return h("div", { class: "legend" }, group(true, "Its own time to first token"), group(false, "What others would pay"));
}

// -- what came of it ---------------------------------------------------------------------------------------------------

function outcome(receipt) {
  const predicted = receipt.predicted_cached_tokens ?? 0;
  const { actual } = receipt;
  if (!actual) return h("p", { class: "outcome open" }, `Predicted ${count(predicted)} cached tokens. No engine has told of it yet.`);
  const off = actual.cached_tokens - predicted;
  const comparable = receipt.prompt_tokens && !receipt.incomplete && receipt.one_sequence !== false;
  const verdict = !comparable ? "not compared" : off === 0 ? "exact" : `${count(Math.abs(off))} ${off > 0 ? "more" : "fewer"}`;
  const times = actual.queued_s + actual.prefill_s;
  return h("dl", { class: "outcome" },
    figure("Predicted", count(predicted), "cached tokens"),
    figure("Actual", count(actual.cached_tokens), `of ${count(actual.prompt_tokens)}`),
    figure("Prediction", verdict, off && comparable ? "than predicted" : ""),
    times ? figure("First token", time(times), actual.queued_s >= 0.001 ? `${time(actual.queued_s)} queued` : "") : null);
}

const figure = (name, value, note) => h("div", {}, h("dt", {}, name), h("dd", {}, value, note ? h("small", {}, ` ${note}`) : null));

// -- the conversation's way -----------------------------------------------------------------------------------------------

function way(turns, current) {
  if (turns.length < 2) return null;
  const last = turns.slice(-TURNS);
  const moves = sum(turns.slice(1).map((turn, i) => Number(turn.receipt.chosen !== turns[i].receipt.chosen)));
  return h("div", { class: "way" },
    h("h3", {}, "Its conversation"),
    h("p", { class: "quiet" }, `${plural(turns.length, "request")} seen, ${moves ? `${plural(moves, "move")}` : "all at one replica"}`),
    h("ol", {}, last.map(({ receipt }, i) => {
      const moved = i > 0 && last[i - 1].receipt.chosen !== receipt.chosen;
      const cached = receipt.actual?.cached_tokens ?? receipt.predicted_cached_tokens ?? 0;
      return h("li", { class: moved ? "moved" : "", "aria-current": receipt.request_id === current ? "step" : false },
        h("b", {}, receipt.chosen), h("small", {}, `${share(cached, receipt.prompt_tokens)} cached`));
    })));
}
