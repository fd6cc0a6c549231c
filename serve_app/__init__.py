"""KVCache Manager: a KV-cache-aware, OpenAI-compatible gateway for vLLM fleets on Ray Serve."""
