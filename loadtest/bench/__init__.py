"""
Measure event streams: this kit, other servers, and a bare C loop, side by side.

`python -m loadtest.bench --help` tells how to run it, README.md what it counts.

* client.c, floor.c   the load client and the floor, compiled on the spot
* fallback.py         the client's commands in Python, for machines without a compiler
* compiler.py         C file -> program in a cache outside the tree
* client.py           drive load clients, add up and judge their reports
* histogram.py        the buckets in which clients report times
* process.py          start servers, read their CPU and memory, end them
* publisher.py        publish over HTTP and over Redis
* peers/              one module per server, all with the same face
* scenario.py         what is done to the servers, and what is read off them
* figures.py          rows, ratios, limits
* report.py           table, JSON
* chart.py            the chart, an SVG
"""
