"""Parts of bench_score.py."""
