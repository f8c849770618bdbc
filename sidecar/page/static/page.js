// Shows the state of the sidecar. All text is inserted as text, never as markup.
"use strict";

const SILENT_MS = 10_000; // there is a heartbeat every two seconds
const AGAIN_MS = 3_000;
const TONES = {
  serving: "good", tuning: "busy", validating: "busy", promoting: "warn", restoring: "warn", draining: "warn",
  starting: "warn", halted: "quiet",
};
const OUTCOMES = { promoted: "good", inconclusive: "warn" };

const at = (id) => document.getElementById(id);
let view = null;
let heartbeat = null;
let receivedAt = 0; // of the browser's clock, milliseconds
let ahead = 0; // how far the sidecar's clock is ahead of the browser's, seconds
let clocks = []; // [node, text of now]: what changes every second

function node(tag, className = "", ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

function drawn(tag, attributes, ...content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

// Unchanged text is not written again: a screen reader would read it again.
function write(id, text) {
  const found = at(id);
  if (found.textContent !== text) found.textContent = text;
}

function show(id, shown) {
  at(id).hidden = !shown;
}

// Times

const now = () => Date.now() / 1000 + ahead;

// In the browser's time zone, and in UTC if that differs: logs and colleagues may be elsewhere.
function clock(seconds) {
  const when = new Date(seconds * 1000);
  const two = "2-digit"; // hours before ten would have one digit
  const local = when.toLocaleTimeString("en-GB", { hour: two, minute: two, second: two, timeZoneName: "short" });
  const time = when.getTimezoneOffset() ? `${local} (${when.toISOString().slice(11, 16)} UTC)` : local;
  const day = when.toDateString() === new Date().toDateString() ? "" : `${when.toLocaleDateString("en-CA")} `;
  return day + time;
}

function lasting(seconds) {
  const whole = Math.max(Math.round(seconds), 0);
  if (whole < 100) return `${whole} s`;
  if (whole < 6000) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} days`;
}

function ticking(found, text) {
  clocks.push([found, text]);
  found.textContent = text();
  return found;
}

// Sections

function fact(name, text, live) {
  const value = node("dd");
  if (live) ticking(value, text);
  else value.textContent = text;
  at("facts").append(node("div", "", node("dt", "", name), value));
}

function showState() {
  const { state, paused, last_window: last } = view;
  const open = heartbeat.window_left_s !== null;
  at("state").className = TONES[state.word] ?? "";
  write("word", state.word);
  write("about", state.about);
  // The last window explains a state that it led to.
  const explained = !open && last && last.reason && state.why.includes(last.reason);
  write("why", state.why && !explained ? `Why: ${state.why}` : "");
  write("window", open && view.window ? `Window open since ${clock(view.window.at)}: ${view.window.text}` : "");
  const because = last?.reason ? `, because ${last.reason}` : "";
  write("last-window", !open && last ? `Last window, ended ${clock(last.at)}: ${last.meaning}${because}.` : "");
  document.title = `${state.word} · sloguard`;
  showSteps(open);
  at("facts").replaceChildren();
  if (open) fact("Window time left", () => lasting(windowLeft()), true);
  fact(`${state.word} for`, () => lasting(now() - state.since), true);
  if (!open) fact("Next window", nextWindow());
  show("paused", paused !== null);
  if (paused) write("paused", `Paused since ${clock(paused.at)}${paused.text && `: ${paused.text}`}. No window opens meanwhile.`);
}

const windowLeft = () => Math.max(heartbeat.window_left_s - (now() - heartbeat.at), 0);

function nextWindow() {
  if (view.paused !== null) return "none while paused";
  return heartbeat.next_window_at === null ? "none scheduled" : clock(heartbeat.next_window_at);
}

function showSteps(open) {
  const { steps } = view;
  show("steps", open && steps.length > 0);
  at("steps").replaceChildren(...(open ? steps : []).map(({ title, status, progress, ends_at: ends }) => {
    const made = node("li", status, node("b", "", title), ...(progress ? [node("span", "", progress)] : []));
    if (status === "current") made.setAttribute("aria-current", "step");
    if (ends !== null && status === "current") {
      const left = () => Math.min(Math.max(ends - now(), 0), windowLeft());
      made.append(ticking(node("span"), () => `${progress ? ", " : ""}about ${lasting(left())} left`));
    }
    return made;
  }));
  const back = steps.at(-1)?.ends_at ?? null;
  const latest = now() + (open ? windowLeft() : 0);
  const expected = back !== null && back < latest ? `about ${clock(back)}, and ` : "";
  write("back-by", open && steps.length ? `Serving again ${expected}by ${clock(latest)} at the latest.` : "");
}

function showButtons() {
  const able = connected() && view.epoch > 0;
  show("buttons", view.token_file !== "");
  show("retune", view.state.word === "serving" && view.paused === null && heartbeat.window_left_s === null);
  show("pause", view.paused === null);
  show("resume", view.paused !== null);
  show("rollback", view.configuration.promotion !== null);
  write("rollback", `Roll back promotion ${view.configuration.promotion} …`);
  show("abort", view.state.abortable);
  for (const id of Object.keys(ACTIONS)) at(id).disabled = !able;
}

function showDecision() {
  const decision = view.run?.decision ?? null;
  show("decided", decision !== null);
  if (decision === null) return;
  write("decided-head", `Decision of run ${view.run.id}${decision.at === null ? "" : `, ${clock(decision.at)}`}`);
  at("outcome").className = `tag ${OUTCOMES[decision.outcome] ?? "quiet"}`;
  write("outcome", decision.label);
  write("headline", decision.headline);
  const said = `${view.state.why} ${view.last_window?.reason ?? ""}`;
  write("reason", said.includes(decision.reason) ? "" : decision.reason); // already shown with the state
  write("nearest-miss", decision.nearest_miss);
  at("gain").replaceChildren(...gain(decision));
}

// The estimate with its interval, on an axis around no change.
function gain({ gain: middle, low, high }) {
  if (middle === null || low === null || high === null) return [];
  const wide = Math.max(at("decided").clientWidth - 34, 200);
  const [from, to] = [Math.min(low, 0), Math.max(high, 0)];
  const x = (value) => 70 + ((value - from) / (to - from || 1)) * (wide - 140);
  const percent = (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(1)} %`;
  const label = (value, text, y, anchor = "middle") => drawn("text", { x: value, y, "text-anchor": anchor }, text);
  const tone = low > 0 ? "good" : high < 0 ? "bad" : "warn";
  const said = `Gain ${percent(middle)}, between ${percent(low)} and ${percent(high)}.`;
  return [
    drawn(
      "svg", { width: wide, height: 64, role: "img", "aria-label": said },
      drawn("line", { class: "zero", x1: x(0), x2: x(0), y1: 16, y2: 46 }), label(x(0), "no change", 58),
      drawn("g", { class: tone },
        drawn("line", { class: "mark", x1: x(low), x2: x(high), y1: 31, y2: 31 }),
        drawn("circle", { class: "mark full", cx: x(middle), cy: 31, r: 4 })),
      label(x(middle), `gain ${percent(middle)}`, 14),
      label(x(low) - 8, percent(low), 35, "end"), label(x(high) + 8, percent(high), 35, "start"),
    ),
  ];
}

function showServing() {
  const { configuration, state } = view;
  const heads = { serving: "Current configuration", halted: "Last configuration" };
  const coming = state.abortable ? "Incumbent (restored unless a better configuration is found)" : "Next configuration";
  write("serving-head", heads[state.word] ?? coming);
  const since = configuration.since === null ? "" : `, promoted ${clock(configuration.since)}`;
  const what = configuration.name.replace(/^[a-z]/, (letter) => letter.toUpperCase());
  ticking(at("configuration"), () => {
    const left_s = (configuration.probation_until ?? 0) - now();
    return `${what}${since}${left_s > 0 ? `; on probation for ${lasting(left_s)} more` : ""}.`;
  });
  const count = configuration.changes.length;
  const differ = configuration.promotion === null ? "" : " changed";
  show("arguments", count > 0);
  write("arguments-head", `${count} ${count === 1 ? "argument" : "arguments"}${differ}`);
  at("changes").replaceChildren(...configuration.changes.map((change) => node("li", "", change)));
  write("rolled-back", configuration.rolled_back);
  const misses = view.run?.misses_slo ?? "";
  show("misses-slo", misses !== "");
  write("misses-slo", misses);
}

function showLive() {
  const live = heartbeat.live;
  at("live").replaceChildren(...(live && live.requests ? live.meters.map(meter) : []));
  if (view.state.word !== "serving") write("traffic", "");
  else if (live === null) write("traffic", "The plugin has not reported any request yet.");
  else if (!live.requests) write("traffic", `No requests in the last ${lasting(live.over_s)}.`);
  else {
    const share = ((100 * live.missed) / live.requests).toFixed(1);
    const rate = live.rate === null ? "" : ` (${live.rate.toPrecision(3)}/s)`;
    const few = live.few ? " With so few, a p99 is about the maximum." : "";
    write("traffic", `${live.requests} requests in the last ${lasting(live.over_s)}${rate}; `
      + `${live.missed} (${share} %) missed the SLO, ${live.failed} of them failed; ${live.aborted} more aborted by clients.${few}`);
  }
}

function meter({ name, about, measured, limit, share, met }) {
  const tone = met === null ? "quiet" : met ? "good" : "bad";
  const verdict = met === null ? "" : met ? "✓ " : "✗ ";
  const bar = node("div", `bar ${tone}`, node("div"));
  bar.firstChild.style.width = `${Math.min(share ?? 0, 1) * 100}%`;
  return node(
    "div", "meter",
    node("div", "", `${name} `, node("small", "", about)),
    node("div", "", node("b", tone, `${verdict}${measured}`), node("small", "", limit ? ` limit ${limit}` : " no limit")),
    ...(limit ? [bar] : []),
  );
}

function showRun() {
  const run = view.run;
  show("run", run !== null);
  if (run === null) return;
  const left = run.left_out ? ` The first ${run.left_out} are left out.` : "";
  write("run-head", `Trials of run ${run.id}`);
  write("run-about", `Started ${clock(run.started_at)}. Newest first.${left}`);
  const { goal } = run;
  const limits = run.trials[0]?.meters ?? [];
  at("columns").replaceChildren(
    ...["#", "configuration", "state"].map((name, n) => column(name, n === 0)),
    ...limits.map(({ name, limit }) => column(name, true, limit && `≤ ${limit}`)),
    column(goal.name, true), column("took", true),
  );
  at("trials").replaceChildren(...run.trials.toReversed().map((trial) => row(trial, goal)));
  at("chart").replaceChildren(...chart(run.trials, goal));
}

function column(name, number, limit = "") {
  const made = node("th", number ? "number" : "", name, ...(limit ? [node("br"), limit] : []));
  made.setAttribute("role", "columnheader");
  made.setAttribute("scope", "col");
  return made;
}

function cell(className, label, ...content) {
  const made = node("td", className, ...content);
  made.setAttribute("role", "cell");
  if (label) made.dataset.label = label;
  if (made.textContent === "-") made.classList.add("nothing");
  return made;
}

function row(trial, goal) {
  const tag = node("span", `tag ${trial.state.tone}`, `${trial.state.symbol} ${trial.state.label}`);
  tag.title = trial.state.meaning;
  const tags = [tag];
  if (trial.crash) tags.push(" ", node("span", "tag bad", trial.crash));
  const took = node("span");
  if (trial.took_s === null) ticking(took, () => lasting(now() - trial.started_at));
  else took.textContent = lasting(trial.took_s);
  const made = node(
    "tr", "",
    cell("number which", "", `${trial.number}`),
    cell("what", "", node("div", "", trial.role), node("div", "configuration", trial.configuration),
      ...(trial.note ? [node("div", "note", trial.note)] : [])),
    cell("verdict", "", ...tags),
    ...trial.meters.map(measurement),
    cell("number", goal.name, trial.objective), cell("number", trial.took_s === null ? "running for" : "took", took),
  );
  made.setAttribute("role", "row");
  made.dataset.status = trial.status;
  return made;
}

function measurement({ name, measured, met }) {
  return cell(`number ${met === false ? "bad" : ""}`, name, met === false ? `✗ ${measured}` : measured);
}

// The objective of each trial; those without a value are in a row on the worse side.
function chart(trials, goal) {
  const values = trials.map((trial) => trial.value).filter((value) => value !== null);
  if (!values.length) return [];
  const [wide, high, left, low] = [Math.max(at("run").clientWidth - 34, 200), 180, 46, 34];
  const step = 10 ** Math.floor(Math.log10(Math.max(...values))) || 1;
  const most = Math.ceil(Math.max(...values) / step) * step || 1;
  const x = (n) => left + ((n + 0.5) / trials.length) * (wide - left - 8);
  const top = goal.lower_is_better ? 46 : 30;
  const end = goal.lower_is_better ? high - 24 : high - low;
  const aside = goal.lower_is_better ? 30 : high - 22;
  const y = (value) => top + (1 - value / most) * (end - top);
  const parts = [0, most / 2, most].flatMap((value) => [
    drawn("line", { class: "grid", x1: left, x2: wide, y1: y(value), y2: y(value) }),
    drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, `${Number(value.toPrecision(3))}`),
  ]);
  const before = trials.find((trial) => trial.incumbent && trial.value !== null);
  if (before) parts.push(drawn("line", { class: "zero", x1: left, x2: wide, y1: y(before.value), y2: y(before.value) }));
  const every = Math.ceil(trials.length / Math.max(Math.floor(wide / 40), 1));
  trials.forEach((trial, n) => {
    if (n % every === 0) parts.push(drawn("text", { x: x(n), y: high - 2, "text-anchor": "middle" }, `${trial.number}`));
    parts.push(mark(trial, x(n), trial.value === null ? aside : y(trial.value)));
  });
  const named = `${goal.name}, ${goal.unit}`;
  const better = goal.lower_is_better ? "lower is better" : "higher is better";
  parts.push(drawn("text", { x: 0, y: 12 }, `Objective: ${named}; ${better}`));
  const best = goal.lower_is_better ? Math.min(...values) : Math.max(...values);
  const said = `${named} of ${values.length} trials, ${better}; the best has ${best.toPrecision(3)}.`;
  const legend = node("p", "legend", ...["● feasible", "○ infeasible", "◆ incumbent", "✕ crashed", "– not measured",
    ...(before ? ["╌ level of the incumbent"] : [])]
    .map((text) => node("span", "", text)));
  return [drawn("svg", { width: wide, height: high, role: "img", "aria-label": said }, ...parts), legend];
}

function mark(trial, x, y) {
  const { tone, label } = trial.state;
  const title = drawn("title", {}, `trial ${trial.number}: ${label}, ${trial.objective}`);
  const made = drawn("g", { class: tone, transform: `translate(${x} ${y})` }, title);
  const full = trial.status === "feasible" ? " full" : "";
  if (trial.value !== null && trial.incumbent) made.append(drawn("path", { class: `mark${full}`, d: "M0-6 6 0 0 6-6 0z" }));
  else if (trial.value !== null) made.append(drawn("circle", { class: `mark${full}`, r: 4.5 }));
  else if (trial.crash) made.append(drawn("path", { class: "mark", d: "M-4-4 4 4M-4 4 4-4" }));
  else made.append(drawn("path", { class: "mark", d: "M-4 0H4" }));
  return made;
}

function showAll() {
  if (view === null || heartbeat === null) return;
  clocks = [];
  for (const id of ["state", "serving"]) show(id, true);
  write("model", view.model);
  show("problem", view.problem !== "");
  write("problem", view.problem && `This may be out of date: ${view.problem}`);
  showState();
  showButtons();
  showDecision();
  showServing();
  showLive();
  showRun();
}

// The stream

const connected = () => at("lost").hidden;

function received() {
  receivedAt = Date.now();
  write("link", "● live");
  if (connected()) return;
  show("lost", false);
  document.body.classList.remove("stale");
  if (view) showButtons();
}

function lost() {
  if (!connected()) return;
  write("link", "");
  const since = receivedAt ? ` since ${clock(receivedAt / 1000)}` : "";
  write("lost", `Connection lost${since}. ${view ? "The page shows the state at that time. " : ""}Reconnecting …`);
  show("lost", true);
  document.body.classList.add("stale");
  if (view) showButtons();
}

function connect() {
  const source = new EventSource("/api/events");
  let over = false;
  const again = () => {
    if (over) return;
    over = true;
    clearInterval(watch);
    source.close();
    setTimeout(connect, AGAIN_MS);
  };
  const opened = Date.now();
  const watch = setInterval(() => {
    if (Date.now() - Math.max(receivedAt, opened) < SILENT_MS) return;
    lost();
    again();
  }, 1000);
  source.addEventListener("view", ({ data }) => {
    const next = JSON.parse(data);
    if (view && view.version !== next.version) location.reload(); // the sidecar was upgraded
    view = next;
    received();
    showAll();
  });
  source.addEventListener("heartbeat", ({ data }) => {
    const first = heartbeat === null;
    const opening = heartbeat?.next_window_at;
    const open = heartbeat?.window_left_s === null;
    heartbeat = JSON.parse(data);
    ahead = heartbeat.at - Date.now() / 1000;
    received();
    if (first || opening !== heartbeat.next_window_at || open !== (heartbeat.window_left_s === null)) showAll();
    else showLive();
  });
  source.addEventListener("error", () => {
    lost();
    again();
  });
}

// Actions

const TOKEN = "sloguard-token"; // of this tab alone, until it is closed
const ACTIONS = {
  retune: ["Open a window now?", "", "Open window"],
  pause: ["Pause windows?", "No window opens until you resume. A window that is open continues.", "Pause windows"],
  resume: ["Resume windows?", "Windows open again.", "Resume windows"],
  abort: ["Abort this window?", "The running trial is aborted and the incumbent is restored.", "Abort this window"],
  rollback: ["", "The previous promotion, or the arguments of the configuration file, will be served. "
    + "The configuration is quarantined: it is not tried again.", "Roll back"],
};
let pending = "";

function awayText() {
  const until = clock(now() + view.window_s);
  return `vLLM stops serving for up to ${lasting(view.window_s)}, until ${until} at the latest: it drains, is tuned, `
    + "and starts again with the better configuration, or as before.";
}

function ask(name) {
  pending = name;
  const [head, text, yes] = ACTIONS[name];
  write("ask-head", head || `Roll back promotion ${view.configuration.promotion}?`);
  write("ask-text", name === "retune" ? awayText() : text);
  write("ask-yes", yes);
  write("ask-problem", "");
  write("token-path", view.token_file);
  show("reason-field", name === "pause");
  show("token-field", !sessionStorage.getItem(TOKEN));
  at("ask-reason").value = "";
  at("ask").showModal();
}

async function send(event) {
  event.preventDefault();
  const token = sessionStorage.getItem(TOKEN) ?? at("ask-token").value.trim();
  const action = { epoch: view.epoch };
  if (pending === "pause") action.reason = at("ask-reason").value;
  if (pending === "rollback") action.promotion = view.configuration.promotion;
  at("ask-yes").disabled = true;
  try {
    const answer = await fetch(`/api/${pending}`, {
      method: "POST",
      headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
      body: JSON.stringify(action),
    });
    const { message, detail } = await answer.json();
    if (answer.status === 401) {
      sessionStorage.removeItem(TOKEN);
      show("token-field", true);
      at("ask-token").focus();
    } else {
      sessionStorage.setItem(TOKEN, token);
    }
    if (answer.ok) {
      at("ask").close();
      write("message", message);
    } else {
      write("ask-problem", typeof detail === "string" ? detail : "the request was invalid");
    }
  } catch {
    write("ask-problem", "the sidecar did not answer");
  } finally {
    at("ask-token").value = "";
    at("ask-yes").disabled = false;
  }
}

for (const name of Object.keys(ACTIONS)) at(name).addEventListener("click", () => ask(name));
at("ask-no").addEventListener("click", () => at("ask").close());
at("ask-form").addEventListener("submit", send);
setInterval(() => {
  if (connected()) clocks.forEach(([found, text]) => { found.textContent = text(); });
}, 1000);
let wide = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== wide) showAll();
  wide = innerWidth;
});
connect();
