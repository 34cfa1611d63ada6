"""What a job will cost: time by stage, memory by stage."""
