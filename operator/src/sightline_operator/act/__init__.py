"""What is done to the cluster: one client, one executor, one writer of status."""
