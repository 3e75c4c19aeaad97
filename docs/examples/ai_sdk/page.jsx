import { useChat } from "@ai-sdk/react";
import { useState } from "react";
import { createRoot } from "react-dom/client";

import { EventSourceTransport } from "./event-source-transport.js";

const root = document.querySelector("#root");

const transport = new EventSourceTransport(async (question) => {
  const response = await fetch("/ask/", {
    method: "POST",
    headers: { "X-CSRFToken": root.dataset.csrf },
    body: new URLSearchParams({ question }),
  });
  if (!response.ok) throw new Error(`The server responded with ${response.status}.`);
  return response.json();
});

function Chat() {
  const [text, setText] = useState("");
  const { messages, sendMessage, status, stop, error } = useChat({
    id: "chat",
    transport,
    resume: true,
  });
  const send = (event) => {
    event.preventDefault();
    sendMessage({ text });
    setText("");
  };
  const runs = status === "submitted" || status === "streaming";
  return (
    <>
      <form onSubmit={send}>
        <input
          aria-label="Question"
          value={text}
          onChange={(event) => setText(event.target.value)}
          required
        />
        <button disabled={runs}>Ask</button>{" "}
        <button type="button" onClick={stop} disabled={!runs}>
          Stop
        </button>
      </form>
      <p id="state">{error ? error.message : status}</p>
      {messages.map(({ id, role, parts }) => (
        <p key={id} className={role} style={{ whiteSpace: "pre-wrap" }}>
          {parts.map((part) => part.text)}
        </p>
      ))}
    </>
  );
}

createRoot(root).render(<Chat />);
