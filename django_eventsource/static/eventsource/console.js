// The console of the admin. It reads the details of the processes every two seconds while the page is visible, and
// shows the events of a token in the live tail. All values are set as text, never as HTML.

const POLL_MS = 2000;
const POLLS_PER_REQUEST = 3; // The processes write their details for 15 seconds after a request.
const POINTS = 60;
const DEAD_MS = 300000; // A process that is not alive is shown for so long.
const SILENT_SECONDS = 5; // A message may take some time.
const MAX_ROWS = 500;
const CLOSED = "connecting again";
const REFUSED = "connecting again: a limit of streams is reached, or the server is busy or stops";
const TAIL_KEY = "eventsource-tail";
const RETRY_MS = 3000;
const POLL_TIMEOUT_MS = 10000;

const byId = (id) => document.getElementById(id);
const root = byId("console");
// Not an attribute, in which HTML changes line ends.
const pageToken = byId("console-token") && JSON.parse(byId("console-token").textContent);
const setText = (id, text) => byId(id) && (byId(id).textContent = text);

// Tables

function fill(tbody, rows) {
  if (!tbody) return;
  const titles = titlesOf(tbody);
  const none = document.createElement("tr");
  none.append(Object.assign(document.createElement("td"), { textContent: "–", colSpan: titles.length }));
  // What does not change is kept, so that a link keeps the focus. If its row moves, its new place gets the focus.
  const focused = tbody.contains(document.activeElement) ? document.activeElement.href : null;
  replaceChanged(tbody, rows.length ? rows.map((cells) => rowOf(titles, cells)) : [none]);
  if (focused && !tbody.contains(document.activeElement)) {
    [...tbody.querySelectorAll("a")].find((link) => link.href === focused)?.focus();
  }
}

function replaceChanged(parent, children) {
  children.forEach((child, n) => {
    const old = parent.children[n];
    if (!old) parent.append(child);
    else if (child.matches("tr")) replaceChanged(old, [...child.children]);
    else if (!old.isEqualNode(child)) old.replaceWith(child);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}

function titlesOf(tbody) {
  return [...tbody.closest("table").querySelectorAll("th")].map((th) => th.textContent);
}

function rowOf(titles, cells) {
  const row = document.createElement("tr");
  cells.forEach((cell, n) => {
    const td = document.createElement("td");
    td.dataset.label = titles[n];
    td.append(cell);
    row.append(td);
  });
  return row;
}

function linkTo(token) {
  const link = document.createElement("a");
  link.href = `${root.dataset.page}?${new URLSearchParams({ token })}`;
  link.textContent = token;
  return link;
}

function stateOf(text) {
  const span = document.createElement("span");
  span.textContent = text;
  if (text === "slow" || text === "not alive" || text.startsWith("silent")) span.className = "state-bad";
  return span;
}

function age(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, unit] = units.find(([one]) => seconds >= one) ?? [1, "s"];
  return `${Math.max(0, Math.floor(seconds / size))} ${unit}`;
}

const rounded = (number) => (number < 10 ? Math.round(number * 10) / 10 : Math.round(number)).toLocaleString();

// Charts

const points = {};

function draw(name, value) {
  const figure = root.querySelector(`[data-chart=${name}]`);
  if (!figure) return;
  const values = (points[name] ??= []);
  values.push(value);
  values.splice(0, values.length - POINTS);
  const most = Math.max(1, ...values);
  const namespace = "http://www.w3.org/2000/svg";
  const svg = figure.querySelector("svg") ?? figure.appendChild(document.createElementNS(namespace, "svg"));
  svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${figure.querySelector("figcaption").textContent}, ${rounded(most)} at most`);
  const line = svg.querySelector("polyline") ?? svg.appendChild(document.createElementNS(namespace, "polyline"));
  const first = POINTS - values.length;
  line.setAttribute("points", values.map((one, n) => `${first + n},${39 - (one / most) * 37}`).join(" "));
  figure.querySelector("output").textContent = rounded(value);
}

// The processes

const processes = new Map();

function note(found) {
  const now = Date.now();
  for (const one of processes.values()) one.alive = false;
  for (const details of found) {
    const before = processes.get(details.process);
    const one = { details, alive: true, seen: now, rates: before?.rates ?? {} };
    const seconds = before ? details.time - before.details.time : 0;
    if (seconds > 0) {
      for (const name of Object.keys(details.counters)) {
        one.rates[name] = Math.max(0, details.counters[name] - before.details.counters[name]) / seconds;
      }
    }
    processes.set(details.process, one);
  }
  for (const [name, one] of processes) if (now - one.seen > DEAD_MS) processes.delete(name);
}

function show(time) {
  const all = [...processes.values()];
  const alive = all.filter((one) => one.alive);
  const sum = (value) => alive.reduce((total, one) => total + value(one), 0);
  const nameOf = ({ host, pid }) => `${host} ${pid}`;
  const streams = sum((one) => one.details.streams);
  setText("processes-alive", alive.length);
  setText("streams", streams);
  setText("slow", sum((one) => one.details.slow_streams));
  setText("resets", sum((one) => one.details.counters.resets));
  if (all.length) {
    draw("streams", streams);
    draw("delivered", sum((one) => one.rates.delivered ?? 0));
    draw("published", sum((one) => one.rates.published ?? 0));
  }
  fill(byId("processes"), all.map(({ details, alive, rates }) => [
    details.host, details.pid, stateOf(alive ? "alive" : "not alive"), age(time - details.since),
    alive ? details.streams : 0, alive ? rounded(rates.delivered ?? 0) : 0,
    details.counters.resets, details.counters.overflows,
  ]));
  fill(byId("slow-listeners"), alive.flatMap(({ details }) => details.slow.map((one) => [
    linkTo(one.token), one.user || "anonymous", one.address, age(time - one.since), nameOf(details),
  ])));
  const tokens = new Map();
  for (const { details } of alive) {
    for (const [token, count] of details.busiest) tokens.set(token, (tokens.get(token) ?? 0) + count);
  }
  fill(byId("busiest"), [...tokens].sort((a, b) => b[1] - a[1]).slice(0, 10).map(([token, count]) => [linkTo(token), count]));
  const silence = Math.max(0, ...alive.map((one) => one.details.layer_silence));
  if (byId("layer-state")?.dataset.shared !== undefined) {
    byId("layer-state").replaceChildren(silence > SILENT_SECONDS ? stateOf(`silent for ${age(silence)}`) : "delivers");
  }
  showToken(alive, time, nameOf);
}

function showToken(alive, time, nameOf) {
  const token = pageToken;
  if (token === null) return;
  const found = alive.filter((one) => Object.hasOwn(one.details.tokens, token));
  setText("token-streams", found.reduce((total, one) => total + one.details.tokens[token].streams, 0));
  fill(byId("listeners"), found.flatMap(({ details }) => details.tokens[token].listeners.map((one) => [
    one.user || "anonymous", one.address, age(time - one.since), stateOf(one.state), nameOf(details),
  ])));
}

function complain(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

async function poll(n) {
  const query = new URLSearchParams();
  if (pageToken !== null) query.set("token", pageToken);
  if (n % POLLS_PER_REQUEST === 0) query.set("request", "");
  try {
    const options = { headers: { Accept: "application/json" }, signal: AbortSignal.timeout(POLL_TIMEOUT_MS) };
    const response = await fetch(`${root.dataset.details}?${query}`, options);
    if (response.redirected || response.status === 403) {
      complain("You are logged out, or may not see this page any more. Load the page again.");
      return;
    }
    const answer = await response.json();
    complain(answer.error ?? "");
    if (answer.error) return setText("history-state", "not readable");
    setText("history-state", `read in ${rounded(answer.history.seconds * 1000)} ms`);
    note(answer.processes);
    show(answer.time);
  } catch (error) {
    complain(`The server does not respond (${error.message}).`);
  }
}

async function untilVisible() {
  while (document.hidden) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

async function pollForever() {
  for (let n = 0; ; n += 1) {
    if (document.hidden) {
      await untilVisible();
      n = 0;
    }
    await poll(n);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

// The live tail

// Yield the events of a stream, each with its id, and an empty event for a comment. An EventSource returns only the
// actions that the page can name.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = {};
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const colon = line.indexOf(":");
      const name = colon < 0 ? line : line.slice(0, colon);
      const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (colon === 0) yield {};
      else if (line === "") {
        yield event;
        event = {};
      } else if (name === "data") event.data = event.data === undefined ? text : `${event.data}\n${text}`;
      else if (name) event[name] = text;
    }
  }
}

function startTail(tail) {
  const button = tail.querySelector("button");
  const status = tail.querySelector("[role=status]");
  const tbody = tail.querySelector("tbody");
  const titles = titlesOf(tbody);
  let lastId = tail.dataset.cursor ?? ""; // So that the tail continues after the stored events on the page.
  let listening = null; // An object, as long as the user wants to listen.
  let connection = null;

  function append({ id = "", event = "message", data }) {
    const time = new Date().toISOString().slice(0, 19).replace("T", " ");
    const row = rowOf(titles, [id, event, time, data]);
    row.lastElementChild.className = "value";
    tbody.append(row);
    if (tbody.rows.length > MAX_ROWS) tbody.rows[0].remove();
  }

  // Return whether to connect again.
  async function listen(signal) {
    const url = `${tail.dataset.url}?${new URLSearchParams({ token: pageToken })}`;
    const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
    const response = await fetch(url, { headers, signal, cache: "no-store" });
    if (response.status !== 200 || response.redirected) {
      status.textContent = response.status === 204 ? "the token is closed" : `refused with status ${response.status}`;
      return false;
    }
    let open = false;
    for await (const event of eventsOf(response)) {
      // A server that accepts no stream now sends the time to reconnect and nothing else.
      open ||= event.retry === undefined || event.id !== undefined;
      if (open) status.textContent = "listening";
      lastId = event.id ?? lastId;
      if (event.data !== undefined) append(event);
    }
    status.textContent = open ? CLOSED : REFUSED;
    return true;
  }

  async function listenForever(own) {
    for (;;) {
      await untilVisible();
      if (listening !== own) return;
      connection = new AbortController();
      let again = true;
      try {
        again = await listen(connection.signal);
      } catch {
        if (listening === own) status.textContent = CLOSED;
      }
      if (listening !== own) return;
      if (!again) return press(false);
      if (document.hidden) status.textContent = "paused while the page is hidden";
      else await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  function press(on) {
    listening = on ? {} : null;
    connection?.abort();
    button.textContent = on ? "Stop" : "Listen";
    sessionStorage.setItem(TAIL_KEY, on ? pageToken : "");
    if (listening) listenForever(listening);
  }

  button.addEventListener("click", () => {
    if (listening) status.textContent = "not listening";
    press(!listening);
  });
  // A browser opens six HTTP/1.1 connections to a site at most. The tails of hidden pages would use them up.
  document.addEventListener("visibilitychange", () => document.hidden && connection?.abort());
  // The form to publish loads the page again.
  if (sessionStorage.getItem(TAIL_KEY) === pageToken) press(true);
}

pollForever();
const tail = byId("tail");
if (tail?.querySelector("button")) startTail(tail);
