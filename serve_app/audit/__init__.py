"""`kvcache audit`: what the index predicts, against what the engines say they took from their caches.

Requests go one at a time through a running gateway. Before each one the Score API says what every replica holds; the
answer names the replica that gave it and, in its usage, the tokens which that engine had cached. The two are compared.

    traffic.py   which requests: generated conversations, or a file
    probe.py     one request: predict, ask, compare
    report.py    all of them: the distribution of the error, as table and JSON
    run.py       the command: from a URL (or a config to start) to audit.json
"""
