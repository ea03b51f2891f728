"""OpenAI's files and batches over an object store: checked, kept, and done by this process or by a cluster."""
