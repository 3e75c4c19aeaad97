// <eventsource-progress src="URL"> shows the events of track() in the elements that it contains.
//
// The URL is that of a stream with rewind=1, so a page that is loaded again starts with the newest
// event. A browser reconnects after the end of a stream. If the response is not a stream, for example
// while a server is restarted behind a proxy, the element opens a new stream after some time.

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 60000;

class EventSourceProgress extends HTMLElement {
  #source = null;
  #timer;
  #waitMs = FIRST_WAIT_MS;

  connectedCallback() {
    this.#open();
  }

  disconnectedCallback() {
    this.#stop();
  }

  #open() {
    this.#stop();
    const source = new EventSource(this.getAttribute("src"));
    this.#source = source;
    source.onopen = () => {
      this.#waitMs = FIRST_WAIT_MS;
    };
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) return;
      this.#timer = setTimeout(() => this.#open(), this.#waitMs);
      this.#waitMs = Math.min(2 * this.#waitMs, LONGEST_WAIT_MS);
    };
    for (const action of ["progress", "done", "failed"]) {
      source.addEventListener(action, (event) => this.#show(action, JSON.parse(event.data)));
    }
    // Events are missing. The newest one, with which a new stream starts, contains the state.
    source.addEventListener("reset", () => this.#open());
    source.addEventListener("close", () => this.#stop());
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#source?.close();
  }

  #show(state, detail) {
    const { done, total } = detail;
    const bar = this.querySelector("progress");
    const share = total === null ? null : total === 0 ? 1 : done / total;
    if (share !== null) bar.value = share;
    else if (state === "progress") bar.removeAttribute("value");
    else bar.value = 0;
    for (const element of this.querySelectorAll("[data-share]")) {
      const percent = new Intl.NumberFormat(undefined, { style: "percent" });
      element.textContent = share === null ? "" : percent.format(share);
    }
    for (const element of this.querySelectorAll("[data-state]")) {
      element.hidden = element.dataset.state !== state;
    }
    this.setAttribute("state", state);
    if (state !== "progress") this.#stop();
    this.dispatchEvent(new CustomEvent(state, { detail, bubbles: true }));
  }
}

customElements.define("eventsource-progress", EventSourceProgress);
