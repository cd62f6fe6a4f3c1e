"""A toy captioner: SmolLM2-135M-Instruct that was taught, in minutes on a CPU, to answer questions about pictures of digits."""
