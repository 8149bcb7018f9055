"""Activation-aware weight quantization with error compensation, from second moments alone."""
