"""`kvcache doctor`: what is misconfigured, and what to do about it.

gather.py     facts: of this machine, of a Serve config, of Redis and what the pods say there
checks.py     facts -> findings; plain functions
"""
