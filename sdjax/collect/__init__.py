"""What methods do with texts: contexts, rollouts and verdicts, lessons, peers, memory, controls."""
