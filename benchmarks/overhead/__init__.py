"""What `bench_overhead.py` is made of: simulated engines, systems under test, load client, report."""
