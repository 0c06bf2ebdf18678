"""What a run leaves behind as proof."""
