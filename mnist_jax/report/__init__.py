"""What happened in a run: its status, its history and its report."""
