"""
A production kit for Server-Sent Events: the application.

The files read in the order in which one event travels:

    routes  ->  log (memory_log, redis_log)  ->  reader  ->  window  ->  hub  ->  stream  ->  handoff

``routes`` accepts what is published and what is subscribed to, the log keeps
it in one order for all processes, ``reader`` follows the log, ``window`` holds
its retained part in memory, ``hub`` knows who wants what, ``stream`` is one
client, and ``handoff`` writes to its connection at the kernel's speed.
"""
