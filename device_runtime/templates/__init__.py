"""Chat templates: messages in, text with marked markup out."""
