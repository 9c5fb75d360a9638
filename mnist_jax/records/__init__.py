"""What a run writes for people and their tools."""
