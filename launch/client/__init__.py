"""What runs on the user's side of a cluster: submitting, following, status, and a local Ray head; never in a job."""
