/** The state of a stream. */
export type State =
  /** There is no stream at present. It is opened again after some time. */
  | "connecting"
  /** The stream is open. */
  | "open"
  /** The tab is hidden and `pauseHidden` is set, or the browser has suspended the tab. */
  | "paused"
  /** The token was closed, or `close()` was called. */
  | "closed";

export interface Options {
  /**
   * Share one stream with the tabs of the site that listen to the same tokens and whose grants are
   * bound to the same session and user. A text is compared too. A URL without a grant needs a text
   * that names the user.
   */
  share?: boolean | string;
  /** Leave the stream while the tab is hidden. */
  pauseHidden?: boolean;
  /** The URL of a `RenewGrantView`, which is requested if the server refuses the grant. */
  renew?: string | URL;
  /** Send cookies to another origin, as the option of `EventSource` with this name does. */
  withCredentials?: boolean;
  /**
   * Called after each change of the state, with the status of the last response: 401 or 403 if
   * the server refused it, and 0 if there was none.
   */
  onState?: (state: State, status: number) => void;
}

export interface EventStream extends EventTarget {
  readonly state: State;
  /** The status of the last response, or 0. */
  readonly status: number;
  /** The cursor after the last event, or `""` before the first response. */
  readonly cursor: string;
  /** Stop listening. */
  close(): void;
  /** Call a function, or `handleEvent()` of an object, for each event of an action. */
  addEventListener(
    action: string,
    listener:
      | ((event: MessageEvent<string>) => void)
      | { handleEvent(event: MessageEvent<string>): void }
      | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener(
    action: string,
    listener:
      | ((event: MessageEvent<string>) => void)
      | { handleEvent(event: MessageEvent<string>): void }
      | null,
    options?: boolean | EventListenerOptions,
  ): void;
}

/**
 * Listen to a stream until the token is closed. It is opened again after every other end.
 *
 * @param url - the URL that `{% eventsource_url %}` returned.
 * @throws TypeError if the URL is empty or not valid.
 */
export function connect(url: string | URL, options?: Options): EventStream;
