import { useEffect, useRef, useState } from "react";

// Listen to a stream. `handlers` has a function for each action; it receives the browser's event.
// Returns "connecting", "open", "reconnecting", "closed" or "refused".
export function useEventSource(url, handlers) {
  const [state, setState] = useState("connecting");
  const current = useRef(handlers);
  useEffect(() => {
    current.current = handlers; // A new render may bring new functions. The stream stays open.
  });
  const actions = Object.keys(handlers).join(" ");

  useEffect(() => {
    const source = new EventSource(url);
    const close = () => {
      source.close();
      setState("closed");
    };
    source.onopen = () => setState("open");
    source.onerror = () =>
      setState(source.readyState === EventSource.CLOSED ? "refused" : "reconnecting");
    for (const action of actions.split(" ")) {
      source.addEventListener(action, (event) => current.current[action]?.(event));
    }
    source.addEventListener("close", close);
    return () => source.close();
  }, [url, actions]);

  return state;
}
