"""Text in, token shards out, batches from them."""
