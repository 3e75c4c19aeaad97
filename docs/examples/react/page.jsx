import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";

import { useEventSource } from "./use-event-source.js";

function News({ url }) {
  const [items, setItems] = useState([]);
  const state = useEventSource(url, {
    ping: ({ data, lastEventId }) => setItems((old) => [...old, { data, id: lastEventId }]),
    reset: () => location.reload(),
  });
  return (
    <>
      <p id="state">{state}</p>
      <ul id="news">
        {items.map(({ data, id }) => (
          <li key={id}>{data}</li>
        ))}
      </ul>
    </>
  );
}

const root = document.querySelector("#root");
createRoot(root).render(
  <StrictMode>
    <News url={root.dataset.url} />
  </StrictMode>,
);
