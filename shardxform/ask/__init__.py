"""What a user asks for: which experts to keep, and how to heal and tune."""
