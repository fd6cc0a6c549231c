// Why a request went where it went, in words. In: a receipt. Out: a headline and what explains it.

import { count, time, sum, plural } from "./dom.js";

/** The terms of a cost (serve_app/routing/choice.py). Those that are `own` make the request's own time to first token. */
export const TERMS = [
  { name: "compute_s", label: "compute", own: true, text: "prefill of the tokens it does not hold" },
  { name: "load_s", label: "load", own: true, text: "matched tokens come from a slower tier" },
  { name: "queue_s", label: "queue", own: true, text: "prefill that waits there already" },
  { name: "decode_s", label: "decode", own: true, text: "requests that run there slow the prefill down" },
  { name: "adapter_s", label: "adapter", own: true, text: "its LoRA adapter must be loaded first" },
  { name: "balance_s", label: "balance", own: false, text: "it has more than its share of the requests" },
  { name: "displace_s", label: "displace", own: false, text: "what the new blocks push out is computed again later" },
  { name: "suspect_s", label: "suspect", own: false, text: "it does not answer as it should" },
];

const UNREADABLE = {
  no_body: "the request had no body that can be read",
  body_too_long: "its body is longer than the proxy's buffer",
  no_index: "the index is not there",
  deadline: "its tokens were not there in time",
  error: "scoring it failed; the log says why",
  tokenizer_loading: "the model's tokenizer was being loaded",
  no_tokenizer: "the model's tokenizer cannot be loaded; the log says why",
  unknown_prompt: "the router's tokenizer or template is not the engine's",
  no_generation: "it makes no tokens",
  prepare_busy: "too many large requests were being prepared",
};
const PARTLY = {
  tokens_late: "Only its known beginning was scored: the rest was not tokenized in time.",
  tokenizer_busy: "Only its known beginning was scored: the tokenizer was busy.",
  media: "Only the text before the first image or audio was scored.",
};

/** Candidates of a receipt, the cheapest first; `total` is null where the choice did not rest on costs. */
export function candidates(receipt) {
  const rows = Object.entries(receipt.replicas ?? {}).map(([pod, terms]) => {
    const cost = terms.cost_s ?? {};
    const names = Object.keys(cost);
    return {
      pod,
      cost,
      matched: terms.matched_tokens ?? {},
      held: Math.max(sum(Object.values(terms.matched_tokens ?? {})), terms.expected_tokens ?? 0),
      trust: terms.trust ?? "exact",
      total: names.length ? sum(Object.values(cost)) : null,
    };
  });
  const chosenFirst = (row) => (row.pod === receipt.chosen ? 0 : 1);
  return rows.sort((a, b) => (a.total ?? 0) - (b.total ?? 0) || chosenFirst(a) - chosenFirst(b) || b.held - a.held);
}

/** {head, lines}: parts are text, or {pod}. */
export function why(receipt) {
  const rows = candidates(receipt);
  const own = rows.find((row) => row.pod === receipt.chosen);
  const pod = { pod: receipt.chosen };
  const lines = [];
  if (receipt.refused_by) lines.push([{ pod: receipt.refused_by }, " was chosen first and did not take it."]);
  if (receipt.outcome === "fallback" || !own) {
    const reason = UNREADABLE[receipt.reason] ?? `its prompt cannot be scored (${receipt.reason})`;
    return { head: [pod, " had the least to do"], lines: [...lines, [`The cache was not asked: ${reason}.`]] };
  }
  const most = rows.reduce((best, row) => (row.held > best.held ? row : best), own);
  const prompt = receipt.prompt_tokens;
  const head = most.held < 1
    ? ["No replica holds any of it; ", pod, own.total === null ? " was next" : " was the cheapest"]
    : own.held >= most.held
      ? [pod, ` holds ${count(own.held)} of the ${count(prompt)} prompt tokens`]
      : own.held > 0
        ? [pod, ` holds less, ${count(own.held)} of ${count(prompt)} tokens, and was cheaper`]
        : [pod, " holds none of it, and was cheaper"];
  if (own.total !== null) lines.push(compared(own, most, rows));
  if (PARTLY[receipt.incomplete]) lines.push([PARTLY[receipt.incomplete]]);
  if (own.trust !== "exact") lines.push([`What it holds is ${own.trust}, and counts for less.`]);
  return { head, lines };
}

function compared(own, most, rows) {
  const others = rows.filter((row) => row !== own && row.total !== null);
  if (!others.length) return ["No other replica could take it."];
  const rival = most !== own && most.held > own.held ? most : others[0];
  const more = rival.total - own.total;
  const name = { pod: rival.pod };
  if (Math.abs(more) < 1e-6) {
    const equal = others.filter((row) => Math.abs(row.total - own.total) < 1e-6).length;
    return [`${plural(equal, "other replica")} would cost the same; of equals the one that waited longest gets it.`];
  }
  if (more < 0) return [name, ` looks cheaper by ${time(-more)}: it was full, or `, { pod: own.pod }, " had the conversation's last request."];
  const term = TERMS.reduce((best, one) => (gap(rival, own, one) > gap(rival, own, best) ? one : best), TERMS[0]);
  const holds = rival === most && most.held > own.held ? ` holds ${count(most.held)}, but` : "";
  return [holds ? "" : "Next best: ", name, `${holds} would cost ${time(more)} more, most of it ${term.label}: ${term.text}.`];
}

const gap = (a, b, term) => (a.cost[term.name] ?? 0) - (b.cost[term.name] ?? 0);
