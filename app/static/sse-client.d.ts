/*
 * Types of sse-client.js. Name your events once, and every handler knows its data:
 *
 *   interface Events { created: { id: number }; message: string }
 *   const stream = connect<Events>("/events", { topics: ["orders"] });
 *   stream.on("created", ({ id }) => …);
 */

/** What the kit itself sends, and what a run sends. */
export interface KitEvents {
  "stream.open": Opened;
  "stream.position": string;
  /** History was lost: fetch your state again. */
  "stream.reset": { reason: string };
  "stream.draining": { seconds: number };
  "stream.evicted": { reason: string };
  "stream.expiring": { stream: string; seconds: number };
  "stream.expired": { stream: string };
  "run.token": { text: string };
  "run.progress": { percent: number | null; stage: string };
  "run.done": unknown;
  "run.failed": Problem & { reason: string };
}

export interface Opened {
  stream: string;
  process: string;
  topics: string[];
  heartbeat_seconds: number;
}

/** RFC 9457, with the kit's four words: name, rule, value, cure. */
export interface Problem {
  title?: string;
  type?: string;
  status?: number;
  detail?: string;
  name?: string;
  rule?: string;
  value?: unknown;
  cure?: string;
}

export interface Message<Data = unknown, Name extends string = string> {
  readonly event: Name;
  /** As it was sent. */
  readonly text: string;
  /** The stream's position behind this event. */
  readonly id: string;
  /** The text read as JSON, or the text itself where it is none. */
  readonly data: Data;
}

type Known<Events> = Events & Omit<KitEvents, keyof Events>;
/** What `for await` gives: one of the events, but none of the kit's `stream.*`, told apart by `event`. */
export type AnyMessage<Events> = {
  [Name in Exclude<keyof Known<Events> & string, `stream.${string}`>]: Message<Known<Events>[Name], Name>;
}[Exclude<keyof Known<Events> & string, `stream.${string}`>];
export type Handler<Data, Name extends string = string> = (data: Data, message: Message<Data, Name>) => void;

export type State = "new" | "connecting" | "open" | "paused" | "closed";

/**
 * Asked before each connection, and waited for; `renew` is true when the last one was refused or is
 * about to expire. One that throws is asked again later, as after a connection that failed.
 */
export type Supplier =
  | string
  | ((asked: { renew: boolean }) => string | undefined | Promise<string | undefined>);

export interface Options<Events = {}> {
  /** Added to the address as `topic=`. */
  topics?: string | Iterable<string>;
  /** A bearer token: sent by fetch, or with `mode: "eventsource"` exchanged for a ticket. */
  token?: Supplier;
  /** A ticket of `POST /tickets`, for EventSource, which cannot send headers. */
  ticket?: Supplier;
  headers?: Record<string, string>;
  /** `include` also sends cookies to other origins. */
  credentials?: RequestCredentials;
  /** Without it: fetch where `token`, `headers` or `share` is given and for runs, else EventSource. */
  mode?: "eventsource" | "fetch";
  /**
   * One stream for all tabs that share: `true` means those with the same address, a text those
   * with the same text. Needs a secure context; elsewhere each tab has a stream of its own. A tab
   * that comes with a position of its own reads by itself what it missed, and shares from there.
   * Runs are not shared.
   * (!) Where tabs of one browser may be different users, give each user a text of their own.
   */
  share?: boolean | string;
  /** Where to begin: an id that was read before, or `earliest` for all that is kept. */
  lastEventId?: string;
  on?: { [Name in keyof Known<Events> & string]?: Handler<Known<Events>[Name], Name> };
  /** What any handler throws is reported as uncaught, and harms neither the stream nor the others. */
  onstate?: (state: State, stream: Stream<Events>) => void;
  /** The stream was refused for good. */
  onerror?: (error: StreamError) => void;
}

export declare class StreamError extends Error {
  readonly problem: Problem;
}

export declare class Stream<Events = {}> implements AsyncIterable<AnyMessage<Events>> {
  readonly state: State;
  readonly lastEventId: string;
  readonly opened: Opened | null;
  readonly error: StreamError | null;
  /** Returns a function that takes the handler away again. `*` hears every event. */
  on(name: "*", handler: Handler<unknown>): () => void;
  on<Name extends keyof Known<Events> & string>(name: Name, handler: Handler<Known<Events>[Name], Name>): () => void;
  /** End the stream; the server learns it at once. */
  close(): void;
  /**
   * End a run on the server too; one whose POST is on its way, as soon as it is known by name.
   * Rejects where the server does not do it.
   */
  cancel(): Promise<void>;
  /**
   * All events but the kit's `stream.*`. Leaving the loop closes the stream. Behind `run.failed`,
   * and where the server refuses for good, it throws a StreamError.
   */
  [Symbol.asyncIterator](): AsyncIterator<AnyMessage<Events>>;
}

/** Follow topics, through reconnects, restarts, drains, sleep and the back-forward cache. */
export declare function connect<Events = {}>(url: string | URL, options?: Options<Events>): Stream<Events>;
/** Start a run; its events come until `run.done` or `run.failed`. */
export declare function run<Events = {}>(url: string | URL, body: unknown, options?: Options<Events>): Stream<Events>;
/** Follow a run that exists already, at `/runs/<id>/events`. */
export declare function follow<Events = {}>(url: string | URL, options?: Options<Events>): Stream<Events>;

/** The incremental parser: bytes in, events out, cut anywhere. */
export declare class Parser {
  lastEventId: string;
  /** The reconnection time in milliseconds, once the server sent one. */
  retry: number | undefined;
  constructor(lastEventId?: string);
  feed(bytes: Uint8Array): { event: string; text: string; id: string }[];
}
