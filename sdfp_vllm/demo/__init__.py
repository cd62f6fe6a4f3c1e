"""`sdfp demo`: a plan and plain vLLM compared on chats, for any model."""
