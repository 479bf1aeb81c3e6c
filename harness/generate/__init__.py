"""Text from a checkpoint, over the deployed paths: prefill, extend and decode with a cache."""
