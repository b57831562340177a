"""One script per published figure; each runs the peer in the same run and prints its figures as JSON last."""
