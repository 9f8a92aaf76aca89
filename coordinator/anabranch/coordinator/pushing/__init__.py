"""Published adapters for others: into an OCI image layout, or a clone of a Hub repository."""
