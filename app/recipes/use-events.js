/*
 * A React hook: follow topics for as long as a component is shown.
 *
 *   const { state } = useEvents("/events", { topics: ["orders"], share: true }, {
 *     created: (order) => setOrders((orders) => [...orders, order]),
 *     "stream.reset": () => refetch(),
 *   });
 *
 * Needs sse-client.js beside it. Handlers may change with every render; the
 * stream is opened anew only when the address, the topics or the names change.
 */

import { useEffect, useRef, useState } from "react";

import { connect } from "./sse-client.js";

export function useEvents(url, options = {}, handlers = {}) {
  const [state, setState] = useState("new");
  const [error, setError] = useState(null);
  const latest = useRef(handlers);
  latest.current = handlers;
  const topics = [options.topics ?? []].flatMap((each) => (typeof each === "string" ? each : [...each])).join(" ");
  // A name may hold spaces, and no line end.
  const names = Object.keys(handlers).join("\n");

  useEffect(() => {
    setError(null);
    const stream = connect(url, {
      ...options,
      onstate: (state, stream) => {
        setState(state);
        options.onstate?.(state, stream);
      },
      onerror: (error) => {
        setError(error);
        options.onerror?.(error);
      },
    });
    for (const name of names.split("\n").filter(Boolean)) {
      stream.on(name, (data, message) => latest.current[name]?.(data, message));
    }
    return () => stream.close();
  }, [url, topics, names]);

  return { state, error };
}
