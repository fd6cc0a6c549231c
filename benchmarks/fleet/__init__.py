"""Fleet simulator: GPU replicas in simulated time, driven by the routing code that ships (issue 5).

request -> workloads -> simulate (event loop) -> policies (choose) -> replica (cache + scheduler) -> metrics
"""
