"""Sub-commands of `kvcache` that are more than an option or two. `serve_app/cli.py` puts them together."""
