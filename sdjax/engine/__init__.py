"""From chats to token batches, per-token signals, samples and updates."""
