"""Scores and choices for fleets that Ray does not manage: over HTTP, gRPC, and as Envoy's endpoint picker."""
