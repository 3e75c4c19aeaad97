const INTERRUPTED = "The answer was interrupted.";

/** A ChatTransport of the AI SDK: answers are events of django-eventsource. */
export class EventSourceTransport {
  // A stream with rewind=all begins with the beginning of the answer.
  resumeStreamIsReplay = true;

  /** ask(text): start an answer, and return the URLs of its stream and of its end. */
  constructor(ask) {
    this.ask = ask;
  }

  async sendMessages({ chatId, messages, abortSignal }) {
    const texts = messages.at(-1).parts.filter((part) => part.type === "text");
    const urls = await this.ask(texts.map((part) => part.text).join("\n"));
    sessionStorage.setItem(`answer ${chatId}`, JSON.stringify(urls));
    return listen(urls, abortSignal);
  }

  async reconnectToStream({ chatId, abortSignal }) {
    const urls = JSON.parse(sessionStorage.getItem(`answer ${chatId}`));
    return urls && listen(urls, abortSignal);
  }
}

function listen(urls, abortSignal) {
  const source = new EventSource(urls.stream);
  let begun = false;
  return new ReadableStream({
    start(controller) {
      const send = (...chunks) => chunks.forEach((chunk) => controller.enqueue(chunk));
      const add = (delta) => {
        if (!begun) send({ type: "start" }, { type: "text-start", id: "answer" });
        begun = true;
        send({ type: "text-delta", id: "answer", delta });
      };
      const end = (...chunks) => {
        source.close();
        if (begun) send({ type: "text-end", id: "answer" });
        send(...chunks);
        controller.close();
      };
      const fail = (errorText) => end({ type: "error", errorText });

      source.addEventListener("delta", (event) => add(event.data));
      source.addEventListener("done", (event) => {
        if (!begun) add(event.data); // a page that opens after the end
        end({ type: "finish" });
      });
      source.addEventListener("stopped", () => end({ type: "abort" }));
      source.addEventListener("failed", (event) => fail(event.data));
      source.addEventListener("interrupted", () => fail(INTERRUPTED));
      source.addEventListener("reset", () => fail(INTERRUPTED)); // resume to receive the whole
      source.addEventListener("error", () => {
        if (source.readyState === EventSource.CLOSED) fail("The stream was refused.");
      });
      const stop = () => {
        fetch(urls.stop, { method: "POST" });
        end({ type: "abort" });
      };
      if (abortSignal?.aborted) stop(); // during ask()
      else abortSignal?.addEventListener("abort", stop);
    },
    cancel() {
      source.close();
    },
  });
}
