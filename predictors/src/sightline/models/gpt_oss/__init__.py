"""gpt-oss: a caption to fuller prose, in the harmony format."""
