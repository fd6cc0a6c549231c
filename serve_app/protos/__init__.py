"""Generated: `make protos` writes the modules beside the .proto files."""
