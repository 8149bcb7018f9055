"""Scheduler, page pool, sessions and sampling parameters: one engine over two backends."""
