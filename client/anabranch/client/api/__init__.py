"""A caller of the coordinator's gRPC API: its certificate, its calls, uploads and downloads."""
