"""What engines are asked, when, and what an ideal cache would have of it."""
