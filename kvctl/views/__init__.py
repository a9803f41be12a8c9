"""What `kvctl inspect` shows: values in, tables and lines out."""
