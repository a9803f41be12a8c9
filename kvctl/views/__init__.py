"""Tables of `kvctl inspect`, built from values."""
