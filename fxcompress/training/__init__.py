"""Training of compressed models on their captured graphs."""
