"""The processes of a job: how they start, meet, watch each other and end; imports neither Hydra nor models."""
