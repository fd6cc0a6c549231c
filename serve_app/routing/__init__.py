"""Who gets a request: costs, what was routed and is not yet seen, and the choice. Pure; the clock is an argument."""
