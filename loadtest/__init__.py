"""
Load on a running kit: the Locust scenarios, and the benchmark beside its peers.
"""
