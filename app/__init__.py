"""
A production kit for Server-Sent Events: the application.

The files read in the order in which one event travels:

    edge  ->  routes  ->  log (memory_log, redis_log)  ->  reader  ->  window  ->  hub  ->  stream  ->  handoff

``edge`` is the door, ``routes`` accepts what is published and what is
subscribed to, the log keeps it in one order for all processes, ``reader``
follows the log, ``window`` holds its retained part in memory, ``hub`` knows who
wants what, ``stream`` is one client, ``opening`` begins it, and ``handoff``
writes to its connection at the kernel's speed. ``kit`` wires them together,
``server`` runs them, and ends them in order. ``leases`` counts each user's
streams over all processes, and ``control`` ends and renews one wherever it is.
"""
