"""Workers that copy their own caches: client, mapped arena, server-side tickets."""
