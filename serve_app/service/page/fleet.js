// The fleet at a glance: figures, replicas as tiles, health.

import { h, count, plural, share, short, sum, time } from "./dom.js";

const COMPACT = 24; // more replicas than this: small tiles
const TINY = 96; // and more than this: cells
const LATE_S = 5;

const of = (traffic, pod) => traffic[pod] ?? { requests: 0, prompt_tokens: 0, cached_tokens: 0 };
const blocksOf = (replica) => sum(Object.values(replica.held_blocks ?? {}));
const load = (replica) => replica.in_flight ?? 0;
const stateOf = (replica) => (replica.live ? replica.trust : "gone");

// -- figures ----------------------------------------------------------------------------------------------------------

export function figures({ fleet, traffic }) {
  const { replicas } = fleet;
  const live = replicas.filter((replica) => replica.live);
  const all = live.length + fleet.left_out;
  const exact = live.filter((replica) => replica.trust === "exact").length;
  const gone = replicas.length - live.length;
  const trust = exact === live.length ? "all exact" : `${count(exact)} exact`;
  const inFlight = sum(live.map(load));
  const waiting = sum(live.map((replica) => replica.waiting ?? 0));
  const queued = sum(live.map((replica) => replica.queued_tokens ?? 0));
  const blocks = sum(Object.entries(fleet.blocks).filter(([tier]) => !tier.includes("/")).map(([, number]) => number));
  const meanError = traffic.compared ? traffic.error_tokens / traffic.compared : 0;
  return [
    figure("From cache", share(traffic.cached_tokens, traffic.prompt_tokens, 1),
      traffic.prompt_tokens ? `of ${short(traffic.prompt_tokens)} prompt tokens` : "no engine has told yet"),
    figure("Predicted exactly", share(traffic.exact, traffic.compared, 1),
      traffic.compared ? `${meanError < 10 ? meanError.toFixed(1) : count(meanError)} tokens off on average` : "nothing to compare yet"),
    figure("Replicas", count(all), [live.length ? trust : "none is live", gone ? `${count(gone)} gone` : ""].filter(Boolean).join(", ")),
    figure("In flight", count(inFlight), `${count(waiting)} waiting, ${short(queued)} tokens to prefill`),
    figure("Distinct blocks", short(blocks), fleet.block_size ? `of ${count(fleet.block_size)} tokens` : ""),
  ];
}

const figure = (name, value, note) => h("div", {}, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "note" }, note));

// -- tiles ------------------------------------------------------------------------------------------------------------

export function fleetNote({ fleet }) {
  const more = fleet.left_out ? `, and ${count(fleet.left_out)} more` : "";
  const gone = fleet.replicas.filter((replica) => !replica.live).length;
  return `${plural(fleet.replicas.length, "replica")}${gone ? `, ${count(gone)} gone` : ""}${more}`;
}

export function tiles({ fleet, by_replica: traffic }, last) {
  const { replicas, stores } = fleet;
  if (!replicas.length) return noReplicas();
  const size = replicas.length > TINY ? "tiny" : replicas.length > COMPACT ? "compact" : "";
  const most = {
    blocks: Math.max(1, ...replicas.map(blocksOf)),
    load: Math.max(1, ...replicas.map(load)),
  };
  const cells = replicas.map((replica) => (size === "tiny" ? cell : tile)(replica, of(traffic, replica.pod), most, replica.pod === last));
  return [
    h("ul", { class: `tiles ${size}` }, cells),
    size === "tiny" ? h("p", { class: "quiet" }, "Each cell is a replica. The darker, the more of its prompt tokens came from its cache. Point at one for its figures.") : null,
    stores.length ? h("ul", { class: "tiles stores" }, stores.map((store) => storeTile(store))) : null,
  ].filter(Boolean);
}

function tile(replica, traffic, most, last) {
  const state = stateOf(replica);
  const why = replica.cause ? `${state}: ${replica.cause}` : state;
  return h("li", { class: `tile${last ? " last" : ""}`, "data-state": state },
    h("p", { class: "name" }, h("b", { title: replica.address || replica.pod }, replica.pod),
      h("span", { class: "state", title: why }, state)),
    h("p", { class: "rate" }, share(traffic.cached_tokens, traffic.prompt_tokens), h("small", {}, traffic.prompt_tokens ? " from cache" : " no request lately")),
    tiers(replica, most.blocks),
    h("dl", {},
      pair("In flight", count(load(replica))),
      pair("Waiting", count(replica.waiting ?? 0)),
      pair("To prefill", short(replica.queued_tokens ?? 0))),
    replica.cause ? h("p", { class: "cause" }, replica.cause) : null);
}

const pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

/** Held blocks by tier, beside the GPU cache's capacity where that is known. */
function tiers(replica, most) {
  const held = Object.entries(replica.held_blocks ?? {});
  const room = Math.max(most, replica.capacity_blocks ?? 0);
  const room_of = (tier) => (tier === "gpu" && replica.capacity_blocks ? ` of ${short(replica.capacity_blocks)}` : "");
  const text = held.map(([tier, blocks]) => `${short(blocks)}${room_of(tier)} ${tier}`).join(" · ") || "no blocks";
  return h("div", { class: "held" },
    h("div", { class: "bar", "aria-hidden": "true" }, held.map(([tier, blocks]) => h("span", { "data-tier": tier, style: { width: `${(100 * blocks) / room}%` } }))),
    h("p", {}, text, h("small", {}, held.length ? " blocks" : "")));
}

function cell(replica, traffic, most, last) {
  const state = stateOf(replica);
  const hit = traffic.prompt_tokens ? traffic.cached_tokens / traffic.prompt_tokens : 0;
  const said = `${replica.pod}: ${state}, ${share(hit, 1)} from cache, ${count(load(replica))} in flight, ${short(blocksOf(replica))} blocks${replica.cause ? `, ${replica.cause}` : ""}`;
  return h("li", { class: last ? "last" : "", "data-state": state, title: said },
    h("span", { style: { opacity: (0.12 + 0.88 * hit).toFixed(2) } }), h("span", { class: "hidden" }, said));
}

const storeTile = (store) => h("li", { class: "tile", "data-state": store.live ? "exact" : "gone" },
  h("p", { class: "name" }, h("b", {}, store.domain), h("span", { class: "state" }, store.live ? "shared" : "gone")),
  tiers(store, Math.max(1, blocksOf(store))));

const noReplicas = () => [h("div", { class: "empty card" },
  h("h3", {}, "No replica has registered in Redis yet"),
  h("p", {}, "An engine shows here as soon as its publisher has joined. Ray Serve starts one with each replica (", h("code", {}, "kvcache up"),
    "); beside any other vLLM run ", h("code", {}, "kvcache publish"), " with the same Redis URL and model.")),
];

// -- health ------------------------------------------------------------------------------------------------------------

export function health({ fleet }) {
  return [redis(fleet.redis), ...loops(fleet), publishers(fleet), routers(fleet)];
}

function redis(one) {
  if (one.stale_for_s === undefined) return item("bad", "Redis", "has not answered the index yet");
  if (one.stale_for_s > 2.5) return item("bad", "Redis", `has not answered for ${time(one.stale_for_s)}: decisions rest on the index as it was`);
  if (one.error) return item("warn", "Redis", one.error);
  const lag = one.log_lag_s >= 0.001 ? `; its log is ${time(one.log_lag_s)} late` : "; its log is followed in time";
  return item("good", "Redis", `answers in ${time(one.answered_in_s)}${lag}`);
}

const loops = (fleet) => Object.entries(fleet.loops).map(([name, wrong]) =>
  item(wrong ? "bad" : "good", name[0].toUpperCase() + name.slice(1), wrong || "runs"));

function publishers(fleet) {
  const live = fleet.replicas.filter((replica) => replica.live);
  const lost = live.filter((replica) => replica.events_lost);
  const skipped = live.filter((replica) => replica.events_skipped);
  const silent = live.filter((replica) => replica.age_s !== undefined && replica.age_s > LATE_S);
  const name = (list) => `${list.slice(0, 3).map((replica) => replica.pod).join(", ")}${list.length > 3 ? ", …" : ""}`;
  if (!live.length) return item("warn", "Publishers", "none is there");
  if (lost.length) return item("warn", "Publishers", `KV events were lost at ${name(lost)}: ${count(sum(lost.map((one) => one.events_lost)))} batches`);
  if (silent.length) return item("warn", "Publishers", `no load report for ${time(Math.max(...silent.map((one) => one.age_s)))} from ${name(silent)}`);
  if (skipped.length) return item("warn", "Publishers", `KV events that are not understood at ${name(skipped)}; kvcache status says why`);
  return item("good", "Publishers", `${live.length === 1 ? "one is" : `all ${count(live.length)} are`} heard; no KV event was lost`);
}

const routers = (fleet) => item(fleet.routers ? "good" : "warn", "Routers",
  fleet.routers ? `${plural(fleet.routers, "router")} on this Redis` : "none has announced itself");

const item = (state, name, said) => h("li", { "data-state": state }, h("b", {}, name), h("span", {}, said));
