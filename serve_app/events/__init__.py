"""Write path: an engine's KV events -> canonical block keys -> Redis, in a process of its own."""
