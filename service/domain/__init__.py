"""What a deletion request is and which way it may go; pure."""
