"""The parts of `bench_real.py`: real vLLM engines behind real routers, the same requests to each."""
