"""The block -> pods index: in memory, in Redis, and the mirror that keeps the first equal to the second."""
