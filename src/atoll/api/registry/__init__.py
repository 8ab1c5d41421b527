"""The cell's own image registry: blobs on disk by content, served as OCI distribution under `/v2/`."""
