/*
 * A React hook: follow topics for as long as a component is shown.
 *
 *   const { state } = useEvents("/events", { topics: ["orders"], share: true }, {
 *     created: (order) => setOrders((orders) => [...orders, order]),
 *     "stream.reset": () => refetch(),
 *   });
 *
 * Needs sse-client.js beside it. Handlers may change with every render; the
 * stream is opened anew only when the address or the topics change.
 */

import { useEffect, useRef, useState } from "react";

import { connect } from "./sse-client.js";

export function useEvents(url, options = {}, handlers = {}) {
  const [state, setState] = useState("new");
  const [error, setError] = useState(null);
  const latest = useRef(handlers);
  latest.current = handlers;
  const topics = [...(options.topics ?? [])].join(" ");
  const names = Object.keys(handlers).join(" ");

  useEffect(() => {
    setError(null);
    const stream = connect(url, { ...options, onstate: setState, onerror: setError });
    for (const name of names.split(" ").filter(Boolean)) {
      stream.on(name, (data, message) => latest.current[name]?.(data, message));
    }
    return () => stream.close();
  }, [url, topics, names]);

  return { state, error };
}
