// The page "Live ping": two streams, a chart, a box and a form.

const RETRY_MS = 3000;
const SEND_TIMEOUT_MS = 10000;
const MAX_ROWS = 1000;

// An EventSource that reports its state, and why it has failed.
//
// A browser reconnects after the end of a stream and after a network error, and sends the last event
// id. It stops if the response is not a stream. Then this class requests the URL again, to read why.
class Stream {
  constructor({ url, cursor, actions, finish, onEvent, onState }) {
    Object.assign(this, { url, cursor, actions, finish, onEvent, onState });
  }

  open(state = "connecting") {
    this.stop();
    const url = new URL(this.url, location.href);
    if (this.cursor) url.searchParams.set("last_event_id", this.cursor);
    const source = new EventSource(url);
    this.source = source;
    this.onState(state);
    source.onopen = () => this.onState("open");
    source.onerror = () => {
      if (source.readyState === EventSource.CONNECTING) this.onState("reconnecting");
      else this.explain(url);
    };
    for (const action of new Set([...this.actions, this.finish, "reset", "message"])) {
      source.addEventListener(action, (event) => this.receive(event));
    }
  }

  // Close the stream, and report nothing.
  stop() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }

  // Listen from now on, without the events since the last one.
  openFromNow() {
    this.cursor = "";
    this.open();
  }

  receive(event) {
    this.cursor = event.lastEventId || this.cursor;
    if (event.type === this.finish) {
      // Otherwise the browser would reconnect.
      this.stop();
      this.onState("closed", "The token was closed.");
    }
    this.onEvent(event);
  }

  async explain(url) {
    const source = this.source;
    const response = await ask(url);
    if (this.source !== source) return;
    this.stop();
    if (response.status === 204) {
      this.onState("closed", "The token was closed.");
    } else if (response.refused) {
      this.onState("failed", `${response.text} Reload the page to get a new permission.`, true);
    } else {
      this.onState("reconnecting");
      this.timer = setTimeout(() => this.open("reconnecting"), RETRY_MS);
    }
  }
}

// Return the status of a stream's URL, and why it refuses the request. EventSource returns neither.
async function ask(url) {
  const control = new AbortController();
  try {
    const response = await fetch(url, { signal: control.signal });
    const { status } = response;
    const refused = status === 401 || status === 403;
    return { status, refused, text: refused ? await explanation(response) : "" };
  } catch {
    return { status: 0, refused: false, text: "" };
  } finally {
    control.abort();
  }
}

// Return the reason in a response, or its status.
async function explanation(response) {
  const plain = (response.headers.get("Content-Type") ?? "").startsWith("text/plain");
  const text = plain ? (await response.text()).trim() : "";
  return text || `The server responded ${response.status} ${response.statusText}.`;
}

const STATES = {
  connecting: "connecting",
  open: "open",
  reconnecting: "reconnecting",
  closed: "closed",
  failed: "closed: failed",
  paused: "paused",
};

function showState(element, state) {
  element.dataset.state = state;
  element.textContent = STATES[state];
}

function showNotice(element, text, error = false) {
  element.textContent = text;
  element.classList.toggle("error", error);
  element.hidden = !text;
}

// The chart

function startChart(section) {
  const find = (name) => section.querySelector(`[data-figure="${name}"]`);
  const svg = section.querySelector("svg");
  const { width, height } = svg.viewBox.baseVal;
  const windowMs = Number(section.dataset.seconds) * 1000;
  let points = [];
  let received = 0;
  let scheduled = false;

  function add(event) {
    if (event.type === "reset") {
      points = [];
    } else {
      const point = JSON.parse(event.data);
      points.push({ ...point, load: (100 * point.load) / point.cores, rawLoad: point.load });
      points = points.filter(({ time }) => time > point.time - windowMs);
      received += 1;
    }
    // Many events that arrive together are drawn once.
    if (!scheduled) requestAnimationFrame(draw);
    scheduled = true;
  }

  function draw() {
    scheduled = false;
    svg.dataset.received = received;
    const last = points.at(-1);
    if (!last) return;
    const highest = Math.max(...points.map(({ cpu, load, memory }) => Math.max(cpu, load, memory)));
    const top = Math.max(100, Math.ceil(highest / 20) * 20);
    const x = ({ time }) => width * (1 - (last.time - time) / windowMs);
    const y = (value) => height * (1 - value / top);
    for (const line of svg.querySelectorAll("[data-line]")) {
      const name = line.dataset.line;
      const runs = split(points).map((run) =>
        run.map((point) => `${x(point).toFixed(1)} ${y(point[name]).toFixed(1)}`),
      );
      // A run of one point is a line without length. Its round ends make it a dot.
      line.setAttribute("d", runs.map((run) => `M${run.join("L")}${run[1] ? "" : "h0"}`).join(""));
      const area = svg.querySelector(`[data-area="${name}"]`);
      area?.setAttribute(
        "d",
        runs
          .map((run) => `M${run[0].split(" ")[0]} ${height}L${run.join("L")}V${height}Z`)
          .join(""),
      );
    }
    find("top").textContent = `${top} %`;
    find("middle").textContent = `${top / 2} %`;
    figure(find("cpu"), `${last.cpu.toFixed(0)} %`, `${last.cores} cores`);
    figure(find("load"), `${last.load.toFixed(0)} %`, `1 minute: ${last.rawLoad.toFixed(2)}`);
    figure(
      find("memory"),
      `${last.memory.toFixed(0)} %`,
      `${gigabytes(last.used)}/${gigabytes(last.total)} GiB`,
    );
  }

  const state = section.querySelector(".state");
  const notice = section.querySelector(".notice");
  const stream = new Stream({
    url: section.dataset.url,
    cursor: section.dataset.cursor,
    actions: [section.dataset.action],
    finish: "close",
    onEvent: add,
    onState(name, text = "", error = false) {
      showState(state, name);
      showNotice(notice, text, error);
    },
  });
  // A browser opens six HTTP/1.1 connections to a site, over all its tabs. A hidden chart uses none,
  // and continues after its last event when it is shown.
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && state.dataset.state === "paused") {
      stream.open();
    } else if (document.hidden && stream.source) {
      stream.stop();
      showState(state, "paused");
    }
  });
  stream.open();
}

// Split points into runs, at the times when nothing was measured.
function split(points) {
  const runs = [];
  let before = -Infinity;
  for (const point of points) {
    if (point.time - before > 2500) runs.push([]);
    runs.at(-1).push(point);
    before = point.time;
  }
  return runs;
}

function figure(element, value, detail) {
  const small = document.createElement("small");
  small.textContent = detail;
  element.replaceChildren(value, small);
}

function gigabytes(bytes) {
  return (bytes / 2 ** 30).toFixed(1);
}

// The box

function startBox(log, form) {
  const list = log.querySelector("ol");
  const state = document.getElementById("state");
  const notice = document.getElementById("notice");
  const [text, button] = notice.children;

  function add(event) {
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    const row = document.createElement("li");
    row.classList.toggle("finish", event.type === log.dataset.finish);
    row.classList.toggle("reset", event.type === "reset");
    row.append(
      span("action", event.type),
      span("data", event.type === "reset" ? missed(event.data) : event.data),
      span("id", event.lastEventId),
    );
    list.append(row);
    while (list.children.length > MAX_ROWS) list.firstChild.remove();
    log.querySelector(".empty").hidden = true;
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  const stream = new Stream({
    url: log.dataset.url,
    cursor: log.dataset.cursor,
    actions: [...form.elements.action.options].map((option) => option.value),
    finish: log.dataset.finish,
    onEvent: add,
    onState(name, message = "", error = false) {
      showState(state, name);
      text.textContent = message;
      notice.classList.toggle("error", error);
      notice.hidden = !message;
      button.hidden = !message;
      button.textContent = error ? "Reload" : "Listen again";
      button.onclick = error ? () => location.reload() : () => stream.openFromNow();
    },
  });
  stream.open();
}

function span(name, text) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = text;
  return element;
}

function missed(data) {
  let reason = "";
  try {
    reason = ` (${JSON.parse(data).reason})`;
  } catch {
    // The reset of another server has no reason.
  }
  return `Some events are missing here${reason}.`;
}

// The form

function startForm(form) {
  const { action, value } = form.elements;
  const send = form.querySelector("button");
  const result = document.getElementById("result");

  form.addEventListener("submit", async (submit) => {
    submit.preventDefault();
    send.disabled = true;
    try {
      const response = await fetch(action.selectedOptions[0].dataset.url, {
        method: "POST",
        headers: { "Content-Type": form.dataset.contentType },
        body: value.value,
        signal: AbortSignal.timeout(SEND_TIMEOUT_MS),
      });
      if (response.ok) {
        showNotice(result, sent(action.value, (await response.json()).id));
      } else {
        const expired = response.status === 401;
        const advice = expired ? " Reload the page to get a new permission." : "";
        showNotice(result, `Not sent. ${await explanation(response)}${advice}`, true);
      }
    } catch (error) {
      showNotice(result, failure(error), true);
    } finally {
      send.disabled = false;
    }
  });

  function sent(name, id) {
    const done = `Sent ${name}${id ? ` with id ${id}` : ""}.`;
    return name === form.dataset.retry
      ? `${done} Browsers set their reconnection time to it, and show no event.`
      : done;
  }

  value.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

function failure(error) {
  return error.name === "TimeoutError"
    ? "No response within 10 seconds. Browsers open six connections to a site. Are many of its tabs open?"
    : "Not sent: the server cannot be reached.";
}

startChart(document.getElementById("machine"));
const form = document.getElementById("send");
if (form) {
  startBox(document.getElementById("log"), form);
  startForm(form);
}
