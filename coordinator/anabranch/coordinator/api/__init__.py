"""The coordinator's gRPC API: enrolment, federations, uploads and downloads, over mutual TLS."""
