"""What should be done: from an object and what was seen to actions, status and events. Pure."""
