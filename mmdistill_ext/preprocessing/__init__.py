"""What happens to a batch between collating and normalising."""
