// The page: asks for what is new every two seconds while it is looked at, and shows it.

import { Refused, forgetKey, get, hasKey, setKey } from "./api.js";
import { accuracy, branches } from "./charts.js";
import { explanation, stream } from "./decisions.js";
import { h } from "./dom.js";
import { figures, fleetNote, health, tiles } from "./fleet.js";

const PERIOD_MS = 2000;
const KEPT = 256; // decisions
const LISTED = 60;
const OPEN_S = 120; // so long one is shown that no engine tells of, unless the service still names it

const $ = (id) => document.getElementById(id);
const state = {
  model: "", last: "", overview: null, paused: false, picked: "", allRows: false,
  complete: new Map(), open: new Map(), // by request id
  shown: {}, timer: 0, round: 0,
};

// -- asking -----------------------------------------------------------------------------------------------------------

async function ask() {
  clearTimeout(state.timer);
  if (state.paused || document.hidden) return;
  const round = ++state.round;
  try {
    const [overview, news] = await Promise.all([
      get("overview", { model: state.model }),
      get("decisions", { model: state.model, after: state.last, limit: "100" }),
    ]);
    if (round !== state.round) return; // another model was chosen meanwhile
    take(overview, news);
    show();
  } catch (error) {
    if (round === state.round) failed(error);
  }
  if (round === state.round && $("key-form").hidden) state.timer = setTimeout(ask, PERIOD_MS);
}

function take(overview, news) {
  state.overview = overview;
  state.last = news.last;
  for (const one of news.decisions.reverse()) {
    state.open.delete(one.receipt.request_id);
    state.complete.delete(one.receipt.request_id);
    state.complete.set(one.receipt.request_id, one);
  }
  for (const id of state.complete.keys()) if (state.complete.size > KEPT) state.complete.delete(id);
  for (const one of news.open) if (!state.complete.has(one.receipt.request_id)) state.open.set(one.receipt.request_id, one);
  for (const [id, one] of state.open) {
    const named = news.open.some((other) => other.receipt.request_id === id);
    if (!named && overview.at_s - one.receipt.at_s > OPEN_S) state.open.delete(id);
  }
}

function failed(error) {
  if (error instanceof Refused && error.wantsKey) return askForKey(error);
  const why = error instanceof Refused ? error.message : "the service does not answer";
  say("bad", state.overview ? `Not live: ${why}` : why[0].toUpperCase() + why.slice(1));
}

function askForKey(error) {
  $("key-why").textContent = hasKey() ? `The service refused the key: ${error.message}.` : "The page is open, its figures are not.";
  if (error.status === 401) forgetKey();
  $("content").hidden = true;
  $("key-form").hidden = false;
  $("key").focus();
  say("wait", "Waiting for a key");
}

// -- showing ----------------------------------------------------------------------------------------------------------

/** Put it there if it is not what is there already: so nothing moves under a reader's eyes for no reason. */
function put(id, told, make) {
  const text = JSON.stringify(told);
  if (state.shown[id] === text) return;
  state.shown[id] = text;
  const focused = document.activeElement?.dataset?.id;
  $(id).replaceChildren(...[make()].flat().filter(Boolean));
  if (focused && $(id).contains(document.querySelector(`[data-id="${CSS.escape(focused)}"]`))) {
    document.querySelector(`[data-id="${CSS.escape(focused)}"]`).focus({ preventScroll: true });
  }
}

function show() {
  const { overview } = state;
  $("key-form").hidden = true;
  $("content").hidden = false;
  showModels(overview);
  const newest = [...state.complete.values(), ...state.open.values()].sort((a, b) => b.receipt.at_s - a.receipt.at_s);
  const listed = newest.slice(0, LISTED);
  const current = newest.find((one) => one.receipt.request_id === state.picked) ?? newest[0];
  put("figures", [overview.fleet.replicas, overview.traffic], () => figures(overview));
  put("stream", [listed, current?.receipt.request_id], () => listed.length
    ? stream(listed, current.receipt.request_id, pick) : h("li", { class: "quiet none" }, "None yet."));
  showWhy(current, newest, overview);
  const last = newest[0]?.receipt.chosen;
  put("fleet-note", [fleetNote(overview)], () => fleetNote(overview));
  put("fleet", [overview.fleet.replicas, overview.by_replica, last], () => tiles(overview, last));
  put("accuracy", [state.last, newest.length], () => accuracy(newest));
  put("branches", [overview.branches, overview.traffic.requests], () => branches(overview));
  put("health", [overview.fleet.redis, overview.fleet.loops, overview.fleet.replicas, overview.fleet.routers], () => health(overview));
  $("follow").hidden = !state.picked;
  const { redis } = overview.fleet;
  const away = redis.stale_for_s === undefined || redis.stale_for_s > 2.5;
  say(away ? "bad" : "good", away ? "Redis does not answer" : "Live");
}

function showWhy(current, newest, overview) {
  const turns = current?.conversation
    ? newest.filter((one) => one.conversation === current.conversation).reverse() : [];
  put("why", [current, turns.map((one) => one.receipt.request_id), state.allRows], () => current
    ? explanation(current, turns, state.allRows, toggleRows) : noDecisions(overview));
}

function noDecisions({ fleet }) {
  const text = fleet.replicas.length
    ? "Send a request through the router. It shows here when its engine has told what came of it; one that this process has decided shows at once."
    : "Requests are told of here, once a replica is there to get them.";
  return h("div", { class: "empty" }, h("h3", {}, "No decision yet"), h("p", {}, text),
    h("p", { class: "quiet" }, "With policy round_robin, least_loaded or session there are no receipts: those do not ask the cache."));
}

function showModels({ model, models }) {
  $("model-of").hidden = models.length < 2;
  document.title = `${model} · KVCache Manager`;
  put("model", models, () => models.map((name) => h("option", { value: name }, name)));
  $("model").value = model;
}

function say(kind, text) {
  $("status").dataset.state = kind;
  if ($("status").textContent !== text) $("status").textContent = text;
}

// -- people -----------------------------------------------------------------------------------------------------------

function pick(id) {
  state.picked = id;
  state.allRows = false;
  show();
}

function toggleRows() {
  state.allRows = !state.allRows;
  show();
}

$("follow").addEventListener("click", () => pick(""));
$("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  $("pause").setAttribute("aria-pressed", String(state.paused));
  $("pause").textContent = state.paused ? "Go on" : "Pause";
  if (state.paused) say("wait", "Paused");
  ask();
});
$("model").addEventListener("change", (event) => {
  Object.assign(state, { model: event.target.value, last: "", picked: "", complete: new Map(), open: new Map(), shown: {} });
  ask();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  ask();
});
document.addEventListener("visibilitychange", ask);
ask();
