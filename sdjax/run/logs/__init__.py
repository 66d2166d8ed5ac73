"""What a run tells while it goes on: lines, rollouts, trackers, alarms."""
