"""Text or messages become the ids that a member reads, and what it writes becomes messages again."""
