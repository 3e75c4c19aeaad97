// connect(url, options) listens to a stream of django-eventsource. eventsource.d.ts describes the
// options and the result, and docs/reference/browser-module.rst the behaviour.
//
// The stream is read with fetch(), because EventSource does not return the status of a response,
// and not the id of a block without data. The first block of a stream is such a block. Without its
// id, a page would miss the events of an outage that begins before its first event. A browser that
// cannot read a response as text uses EventSource, one for each tab.
//
// With `share` one tab, or a SharedWorker, reads the stream and sends each block to the others,
// with the cursor before it and the cursor after it. One rule keeps each tab exact, whatever
// happens to the others: a tab uses a block only if its own cursor is the one before the block. A
// tab with another cursor reads a stream of its own, until the two meet.
//
// This file is both the module of a page and the script of the SharedWorker.

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 30000;
const LONGEST_RETRY_MS = 3600000; // a longer time would be none for setTimeout()
const STABLE_MS = 10000;
const CHECK_MS = 1500;
const MAX_KEPT = 1000;
const MAX_CHECKS = 10; // of a tab whose cursor and that of the leader change

const isRefused = (status) => status === 401 || status === 403;
const canRead = Boolean(globalThis.TextDecoderStream);

// Return the session and the user that the grant of a URL is bound to. They are at the end of a
// list, in JSON and base64url. A grant of another form is bound to itself.
const bindings = (url) => {
  const grant = new URL(url).searchParams.get("grant");
  if (!grant) return null;
  try {
    const [text] = grant.split(":");
    return JSON.parse(atob(text.replaceAll("-", "+").replaceAll("_", "/"))).slice(-2);
  } catch {
    return [grant];
  }
};

// A stream that is opened again after its end.
//
// An offer is what a tab connects with: {url, renew, credentials}. The last one is used. If the
// server refuses it, and the grant cannot be renewed, the one before it is used.
class Source {
  state = "connecting";
  status = 0;
  #offers;
  #control = new AbortController();
  #report;
  #retryMs = FIRST_WAIT_MS;
  #failures = 0;
  #wake;
  #opened; // a time
  #types = new Set(["close"]); // of listen()
  #plain; // the EventSource, if there is one
  #reader;
  #hasEvents = false; // since the stream was opened
  #again = false; // open it without a wait
  #hasSeveralTokens;

  // report(block) is called for each block, and report() for each other change of the state.
  constructor(offers, cursor, report) {
    this.#offers = offers;
    this.cursor = cursor;
    this.#report = report;
    this.#hasSeveralTokens = new URL(this.offer.url).searchParams.has("token");
    this.#run();
  }

  get offer() {
    return this.#offers.at(-1);
  }

  add(offer) {
    this.#offers = [...this.#offers.filter(({ url }) => url !== offer.url).slice(-9), offer];
    if (isRefused(this.status)) this.#wake?.();
  }

  // EventSource needs the type of each event that it receives.
  listen(type) {
    this.#types.add(type);
    this.#plain?.addEventListener(type, this.#receive);
  }

  // Set the cursor that a new stream has at this position. It may differ after an event.
  refresh() {
    if (this.state !== "open" || !this.#hasEvents) return;
    this.#again = true;
    this.#reader.cancel();
  }

  stop() {
    this.#control.abort();
    this.#wake?.();
  }

  #change(state, status, block) {
    this.state = state;
    this.status = status;
    if (!this.#control.signal.aborted) this.#report(block);
  }

  async #fetch(url, credentials, accept) {
    const { signal } = this.#control;
    return fetch(url, { credentials, signal, cache: "no-store", headers: { Accept: accept } });
  }

  async #run() {
    const { signal } = this.#control;
    let renewed = false; // since the last stream
    while (!signal.aborted) {
      this.#opened = Infinity;
      let end = {};
      const { offer } = this; // another tab may add its own meanwhile
      try {
        const { url, credentials } = offer;
        const target = new URL(url);
        if (this.cursor) target.searchParams.set("last_event_id", this.cursor);
        const read = canRead ? this.#read : this.#readPlain;
        end = await read.call(this, target, credentials);
      } catch {
        // The network failed, or stop() was called.
      }
      if (this.state === "closed" || signal.aborted) return;
      const isOpened = this.#opened < Infinity;
      this.#change("connecting", end.status ?? (isOpened ? 200 : 0));
      if (isOpened) renewed = false;
      if (isRefused(end.status) && (await this.#renew(offer).catch(() => false)) && !renewed) {
        renewed = true;
        continue;
      }
      if (this.#again) {
        this.#again = false;
        continue;
      }
      // A server ends the stream of a quiet token from time to time. This is not a failure.
      if (Date.now() - this.#opened > STABLE_MS) this.#failures = 0;
      const waitMs = Math.min(LONGEST_WAIT_MS, this.#retryMs * 2 ** this.#failures++);
      await new Promise((resolve) => {
        this.#wake = resolve;
        const ms = Math.max(waitMs, this.#retryMs, end.leastMs ?? 0);
        setTimeout(resolve, ms * (1 + Math.random()));
      });
    }
  }

  // Return whether there is a new grant.
  async #renew(offer) {
    const { renew, credentials } = offer;
    const response = renew && (await this.#fetch(renew, credentials, "application/json"));
    if (response?.ok) {
      const url = new URL(offer.url);
      url.searchParams.set("grant", (await response.json()).grant);
      // Another user may have logged in. The page must not receive the events of that user.
      const user = bindings(offer.url)?.[1];
      if (!user || bindings(url)?.[1] === user) {
        offer.url = url.href;
        return true;
      }
    }
    if (this.#offers.length > 1) this.#offers = this.#offers.filter((one) => one !== offer);
    return false;
  }

  #open() {
    this.#opened = Date.now();
    this.#change("open", 200);
  }

  // Use a block. Return whether it ends the stream.
  #accept(after, type, data) {
    this.#failures = 0;
    this.#hasEvents = this.#hasEvents || Boolean(type);
    const block = { before: this.cursor, after, type, data };
    this.cursor = after;
    // The stream of several tokens continues after the close of one. It ends with 204.
    const closes = type === "close" && !this.#hasSeveralTokens;
    this.#change(closes ? "closed" : "open", this.status, block);
    if (closes) this.stop();
    return this.#control.signal.aborted;
  }

  // The events "open" and "error" have data if they were published.
  #receive = ({ type, data, lastEventId }) => {
    if (data === undefined || this.#control.signal.aborted) return;
    this.#accept(lastEventId || this.cursor, type, data);
  };

  // EventSource does not return the status of a response that is not a stream, but fetch() does.
  async #readPlain(url, credentials) {
    this.#plain = new EventSource(url, { withCredentials: credentials === "include" });
    this.#types.forEach((type) => this.listen(type));
    this.#plain.onopen = ({ data }) => data ?? this.#open();
    await new Promise((resolve) => {
      this.#plain.onerror = ({ data }) => data ?? resolve();
      this.#control.signal.onabort = resolve;
    });
    this.#plain.close();
    return this.#opened < Infinity ? {} : this.#read(url, credentials);
  }

  async #read(url, credentials) {
    const response = await this.#fetch(url, credentials, "text/event-stream");
    const { status, headers, body } = response;
    const isStream = headers.get("Content-Type")?.startsWith("text/event-stream");
    let leastMs;
    if (status === 204) {
      this.#change("closed", status);
    } else if (status === 200 && isStream && canRead) {
      this.#open();
      await this.#readBlocks(body);
    } else {
      body?.cancel();
      const seconds = headers.get("Retry-After");
      if (/^\d+$/.test(seconds)) leastMs = Math.min(LONGEST_RETRY_MS, seconds * 1000);
    }
    return { status, leastMs };
  }

  async #readBlocks(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    this.#reader = reader;
    this.#hasEvents = false;
    let rest = "";
    let id = this.cursor;
    let type = "";
    let data = [];
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // The LF of a CR at the end may be in the next chunk.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        const [, field, text] = /^([^:]*):? ?(.*)$/s.exec(line);
        if (field === "data") data.push(text);
        else if (field === "event") type = text;
        else if (field === "id" && !text.includes("\0")) id = text;
        else if (field === "retry" && /^\d+$/.test(text)) {
          this.#retryMs = Math.max(1, Math.min(LONGEST_RETRY_MS, text));
        }
        if (line) continue;
        if (data.length || id !== this.cursor) {
          if (this.#accept(id, data.length ? type || "message" : "", data.join("\n"))) return;
        }
        type = "";
        data = [];
      }
    }
  }
}

// Reads the stream for all tabs: send() sends a message to each of them. The tabs ignore messages of
// an earlier term, because a leader that was suspended may still send some.
class Leader {
  #source;
  #term;
  #send;

  constructor(offer, cursor, term, send) {
    this.#term = term;
    this.#send = send;
    this.#source = new Source([offer], cursor, (block) => send(this.#message(block)));
  }

  get closed() {
    return this.#source.state === "closed";
  }

  // A tab that joins sends its offer, and its cursor. A tab that checks whether there is a leader
  // sends {apart}.
  answer(offer, send = this.#send) {
    if (offer.url) this.#source.add(offer);
    if (offer.apart) this.#source.refresh();
    send(this.#message());
  }

  listen(type) {
    this.#source.listen(type);
  }

  stop() {
    this.#source.stop();
  }

  #message(block) {
    const { state, status, cursor, offer } = this.#source;
    return { term: this.#term, state, status, cursor, offer, block };
  }
}

class Stream extends EventTarget {
  state = "paused";
  status = 0;
  #offer;
  #options;
  #key;
  #ways; // functions that join the other tabs; the last one is used
  #joined = null; // the AbortController of what the tab has joined
  #away = false;
  #cursor;
  #passed = new Set(); // the last cursors of this tab
  #types = new Set(); // of the listeners
  #shared; // the leader's last message
  #own = null; // the stream of a tab whose cursor is not that of the leader
  #held = []; // the leader's blocks since the own stream was opened
  #leader = null; // only if this tab is the leader
  #post; // sends a message to the leader, or from the leader to the tabs
  #silent; // the number of checks since the leader has sent a message

  constructor(url, options) {
    super();
    if (!url) throw new TypeError(`connect() needs the URL of a stream, not ${url}.`);
    const target = new URL(url, location.href);
    this.#cursor = target.searchParams.get("last_event_id") ?? "";
    target.searchParams.delete("last_event_id");
    this.#options = options;
    this.#offer = {
      url: target.href,
      renew: options.renew && new URL(options.renew, location.href).href,
      credentials: options.withCredentials ? "include" : "same-origin",
    };
    // Tabs of different users or sessions must not share.
    const owners = [bindings(target), options.share];
    target.searchParams.delete("grant");
    this.#key = `eventsource ${this.#offer.credentials} ${target.href} ${JSON.stringify(owners)}`;
    this.#ways = [() => this.#lead()];
    if (canRead && options.share && (owners[0] || options.share !== true)) {
      if (navigator.locks) this.#ways.push(() => this.#joinTabs());
      if (window.SharedWorker) this.#ways.push(() => this.#joinWorker());
    }
    this.#listen("addEventListener");
    this.#update();
  }

  get cursor() {
    return this.#cursor;
  }

  close() {
    this.#end(0);
  }

  addEventListener(type, ...options) {
    super.addEventListener(type, ...options);
    this.#types.add(type);
    this.#leader?.listen(type);
  }

  // Joining and leaving

  #listen(method) {
    for (const type of ["pagehide", "freeze", "pageshow", "resume", "visibilitychange"]) {
      window[method](type, this.#update, true); // some of them do not bubble to the window
    }
  }

  #update = (event) => {
    if (event && event.type !== "visibilitychange") {
      this.#away = event.type === "pagehide" || event.type === "freeze";
    }
    const active = !this.#away && !(this.#options.pauseHidden && document.hidden);
    if (active === Boolean(this.#joined)) return;
    if (active) {
      this.#change("connecting", 0);
      this.#join();
    } else {
      this.#leave();
      this.#change("paused", 0);
    }
  };

  #join() {
    this.#joined = new AbortController();
    this.#shared = { term: 0 };
    this.#post = () => {};
    this.#ways.at(-1)();
  }

  #leave() {
    this.#joined?.abort();
    this.#joined = null;
    this.#stopOwn();
  }

  #end(status) {
    this.#leave();
    this.#listen("removeEventListener");
    this.#change("closed", status);
  }

  #change(state, status) {
    if (state === this.state && status === this.status) return;
    this.state = state;
    this.status = status;
    // The browser reports an error of the callback, and the stream continues.
    queueMicrotask(() => this.#options.onState?.(state, status));
  }

  #rejoin() {
    this.#leave();
    this.#join();
  }

  #joinWorker() {
    const { signal } = this.#joined;
    const recover = () => {
      if (signal.aborted) return;
      this.#ways.pop();
      this.#rejoin();
    };
    let worker;
    try {
      worker = new SharedWorker(import.meta.url, { type: "module", name: this.#key });
    } catch {
      return recover(); // this file is on another origin than the page
    }
    worker.onerror = recover; // for example, the policy of the page forbids it
    const { port } = worker;
    this.#post = (message) => port.postMessage(message);
    port.onmessage = ({ data }) => signal.aborted || this.#receive(data);
    signal.addEventListener("abort", () => {
      port.postMessage(null);
      port.close();
    });
    this.#post({ ...this.#offer, cursor: this.#cursor });
    this.#watch(recover);
  }

  // The tab that has the lock is the leader. A suspended tab keeps its lock, so another tab steals
  // the lock of a leader that does not answer.
  #joinTabs() {
    const { signal } = this.#joined;
    const channel = new BroadcastChannel(this.#key);
    this.#post = (message) => channel.postMessage(message);
    channel.onmessage = ({ data }) => {
      if (data.term) this.#receive(data);
      // A frozen tab receives messages, but neither its timers nor its stream run. So it must not
      // answer.
      else setTimeout(() => this.#leader?.answer(data));
    };
    signal.addEventListener("abort", () => channel.close());
    const lead = () => {
      if (signal.aborted) return;
      this.#lead();
      return new Promise((resolve) => signal.addEventListener("abort", resolve));
    };
    const stand = async (options) => {
      try {
        await navigator.locks.request(this.#key, options, lead);
      } catch {
        if (signal.aborted) return;
        this.#stopLeading(); // another tab has stolen the lock
        if (!options.steal) stand(options);
      }
    };
    this.#post(this.#offer);
    stand({ signal });
    this.#watch(() => stand({ steal: true }));
  }

  // Call recover() if the leader does not answer. A tab that has received something since its last
  // check does not ask. The intervals of the tabs differ, so that one tab recovers, or asks, before
  // the others.
  //
  // The own stream of a tab may never meet that of the leader. The same position may have two
  // cursors: that of an event with an id of its own, and that of a new stream. So a tab whose own
  // stream is open, while neither cursor changes or for many checks, asks the leader to open its
  // stream again. If that does not help, for example because one of several tokens was closed and
  // this tab has opened it again, the tab joins those that did not meet this leader either.
  #watch(recover) {
    const { signal } = this.#joined;
    this.#silent = 0;
    let cursors = null;
    let checks = 0; // since the own stream is open
    let hasAsked = false;
    const check = () => {
      if (this.#leader) return;
      const before = cursors;
      cursors = `${this.#cursor} ${this.#shared.cursor}`;
      checks = this.#own?.state === "open" ? checks + 1 : 0;
      hasAsked &&= this.#cursor !== this.#shared.cursor;
      const apart = (checks > 1 && cursors === before) || checks > MAX_CHECKS;
      if (apart && hasAsked && !this.#silent) {
        this.#key += " apart";
        return this.#rejoin();
      }
      hasAsked ||= apart;
      if (apart || this.#silent) this.#post({ apart });
      if (++this.#silent > 2) recover();
    };
    const timer = setInterval(check, CHECK_MS * (1 + Math.random()));
    signal.addEventListener("abort", () => clearInterval(timer));
  }

  #lead() {
    this.#stopOwn();
    this.#stopLeading();
    const term = Math.max(Date.now(), this.#shared.term + 1);
    this.#leader = new Leader(this.#offer, this.#cursor, term, (message) => {
      this.#post(message);
      this.#receive(message);
    });
    this.#joined.signal.addEventListener("abort", () => this.#stopLeading());
    this.#types.forEach((type) => this.#leader.listen(type));
    this.#leader.answer({});
  }

  #stopLeading() {
    this.#leader?.stop();
    this.#leader = null;
  }

  // Receiving

  #receive(message) {
    const { term, block } = message;
    const before = this.#shared.term;
    if (term < before) return;
    this.#silent = 0;
    this.#shared = message;
    // A new leader receives the offers of all tabs, because its own grant may have expired.
    if (term > before && !this.#leader) this.#post(this.#offer);
    if (block?.before === this.#cursor) this.#use(block);
    else if (block && this.#own && this.#held.push(block) > MAX_KEPT) this.#held.shift();
    this.#compare();
  }

  #receiveOwn(own, block) {
    if (block) this.#use(block);
    for (const held of this.#held) {
      if (held.before === this.#cursor) this.#use(held);
    }
    if (own.state === "closed" && this.#own) this.#end(own.status);
    else this.#compare();
  }

  // Open or stop the own stream of this tab.
  #compare() {
    if (!this.#joined) return; // a listener has called close()
    const { state, status, cursor, offer } = this.#shared;
    const met = cursor === this.#cursor;
    if (state === "closed" && met) return this.#end(status);
    // A leader without a stream needs a connection, and browsers limit their number. A leader that
    // is at an earlier cursor of this tab will reach the present one.
    const behind = state === "open" && this.#passed.has(cursor);
    if (met || behind || state === "connecting") this.#stopOwn();
    else if (!this.#own) {
      // The server may refuse the grant of this tab, but not that of the leader.
      const offers = [offer, this.#offer];
      const own = new Source(offers, this.#cursor, (block) => this.#receiveOwn(own, block));
      this.#own = own;
    }
    const used = this.#own ?? this.#shared;
    this.#change(used.state, used.status);
  }

  #stopOwn() {
    this.#own?.stop();
    this.#own = null;
    this.#held = [];
  }

  #use({ after, type, data }) {
    if (!this.#joined) return; // a listener has called close()
    this.#cursor = after;
    if (type === "reset") this.#passed.clear();
    this.#passed.delete(after);
    this.#passed.add(after);
    if (this.#passed.size > MAX_KEPT) this.#passed.delete(this.#passed.values().next().value);
    if (!type) return;
    const { origin } = new URL(this.#offer.url);
    this.dispatchEvent(new MessageEvent(type, { data, lastEventId: after, origin }));
  }
}

// The SharedWorker: it is the leader while a port has joined.
if (globalThis.SharedWorkerGlobalScope) {
  const ports = new Set();
  let leader = null;
  const send = (message) => ports.forEach((port) => port.postMessage(message));
  globalThis.onconnect = ({ ports: [port] }) => {
    const leave = () => {
      ports.delete(port);
      if (ports.size) return;
      leader?.stop();
      leader = null;
    };
    port.onclose = leave;
    port.onmessage = ({ data: offer }) => {
      if (!offer) return leave();
      if ("cursor" in offer) {
        ports.add(port);
        if (!leader || leader.closed) leader = new Leader(offer, offer.cursor, Date.now(), send);
      }
      leader?.answer(offer, (message) => port.postMessage(message));
    };
  };
}

export const connect = (url, options = {}) => new Stream(url, options);
