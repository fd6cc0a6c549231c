"""OpenAI request -> prompt text -> token ids -> canonical block keys, with a store of what has been seen before."""
