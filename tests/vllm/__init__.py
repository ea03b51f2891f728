"""The vLLM engine with vLLM itself; `make test-vllm`."""
